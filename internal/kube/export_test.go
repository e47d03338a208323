package kube

// LastSaid is lastSaid, for the tests.
func LastSaid(lines ...string) (text, hint, kind string) {
	s := lastSaid(lines)
	return s.text, s.hint, s.kind
}

// IsEstablished is isEstablished, for the tests.
var IsEstablished = isEstablished
