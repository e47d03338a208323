package token

func init() { pairBits = testBits } // RSA-4096 takes seconds each

// OpenOAEP is openOAEP, for its own test.
var OpenOAEP = openOAEP
