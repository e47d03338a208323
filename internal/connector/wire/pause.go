package wire

import "time"

// LongestPause is how long any of those who try again may rest: who starts a
// connector that ended, who opens a token that is away, and who logs in and
// opens the master keys. At worst one waits for the other, and each had just
// tried: 0.75 s of the 2 s in which an HSM that is back is to be used. What is
// left is for the work: to start, to log in, to find the keys and try them.
const LongestPause = 250 * time.Millisecond
