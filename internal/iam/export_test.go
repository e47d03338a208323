package iam

// SignForTest spells a token as Issue does.
var SignForTest = sign
