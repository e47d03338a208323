package hsm

import "bytes"

// Finding is one thing that was tried on a token: whether it works, and how
// that is known.
type Finding struct {
	Name  string `json:"name"`
	Works bool   `json:"works"`
	Why   string `json:"why"` // what proved it, or what the token answered
}

// Capabilities are what a token can do for the KMS, found by trying it, never
// by its name.
type Capabilities struct {
	Suite      uint8     `json:"suite"`   // the cipher suite that follows; 0 when none works
	WrapWay    string    `json:"wrapWay"` // how root keys leave the token; empty when no way works
	Placements []string  `json:"placements"`
	Suites     []Finding `json:"suites"`
	WrapWays   []Finding `json:"wrapWays"`
	Imports    []Finding `json:"imports"`
	Guards     []Finding `json:"guards"` // that keys cannot be read or wrapped against their attributes
	Sign       Finding   `json:"sign"`
	Notes      []string  `json:"notes"` // what an operator should know
}

// Report is what `hsm probe` prints and what an operator can send: no key, no
// PIN and no address is in it.
type Report struct {
	Token        TokenInfo    `json:"token"`
	Mechanisms   []Mechanism  `json:"mechanisms"`
	Capabilities Capabilities `json:"capabilities"`
	Usable       bool         `json:"usable"`
}

// ProbeReply is what `kms-connector probe` prints: one of the two.
type ProbeReply struct {
	Report *Report     `json:"report,omitempty"`
	Fault  *ProbeFault `json:"fault,omitempty"`
}

// ProbeFault is a fault of the connector, taken apart.
type ProbeFault struct {
	Kind   string `json:"kind"`
	Op     string `json:"op"`
	Object string `json:"object"`
	Cause  string `json:"cause"`
	Hint   string `json:"hint"`
}

// Mechanism is one line of the token's own list.
type Mechanism struct {
	Number  string `json:"number"` // hexadecimal, as vendors' documents have it
	Name    string `json:"name,omitempty"`
	Flags   string `json:"flags"`
	MinSize uint   `json:"minSize"`
	MaxSize uint   `json:"maxSize"`
}

// checkValueLen is a method's number and three bytes.
const checkValueLen = 4

// SameKey compares two check values. Each is a list of method and value; a
// token whose firmware learnt another method still shows the same key by the
// methods that both have.
func SameKey(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true // also when the token can show neither, now and then
	}
	if len(a)%checkValueLen != 0 || len(b)%checkValueLen != 0 {
		return false
	}
	shared := false
	for i := 0; i < len(a); i += checkValueLen {
		for j := 0; j < len(b); j += checkValueLen {
			if a[i] != b[j] {
				continue
			}
			if !bytes.Equal(a[i:i+checkValueLen], b[j:j+checkValueLen]) {
				return false
			}
			shared = true
		}
	}
	return shared
}
