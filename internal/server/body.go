package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// decode reads the body strictly. An empty body, {} and null are alike: IBM's
// clients send any of them.
func (c *call) decode(v any) error {
	b := bytes.Trim(c.body, " \t\r\n")
	if len(b) == 0 || string(b) == "null" {
		return nil
	}
	if err := decodeStrictly(b, v); err != nil {
		return fault.New(fault.Usage, "", "", err).WithReason(kmsapi.BadBody)
	}
	return nil
}

func decodeStrictly(b []byte, v any) error {
	// What is no text would be read as U+FFFD: of two strings of aad that differ, as the same.
	if !utf8.Valid(b) || loneSurrogate(b) {
		return errors.New("a string is no Unicode text")
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, end := d.Token(); !errors.Is(end, io.EOF) { // More is false before a stray ] or }
		return errors.New("something follows the JSON value")
	}
	if name := twice(b); name != nil {
		return fmt.Errorf("%s %q", twicePrefix, name)
	}
	return nil
}

// twicePrefix begins what is said of a field that stands twice.
const twicePrefix = "json: duplicate field"

// twice gives the name of a field that stands twice in one object of JSON which
// was decoded: the decoder would take the last, and what looked at the body
// before us may have taken the first. As for the decoder, case makes no
// difference. An object has no more names than its type has fields, so that
// comparing each with each is cheap.
func twice(b []byte) []byte {
	var room [32][]byte
	names := room[:0] // of the objects that are open, the innermost last
	var deep [16]int  // where the names of each open object begin; -1: an array
	open := deep[:0]  // the innermost last
	atName := false   // the next string is the name of a field
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '{':
			open, atName = append(open, len(names)), true
		case '[':
			open, atName = append(open, -1), false
		case '}', ']':
			if from := open[len(open)-1]; from >= 0 {
				names = names[:from]
			}
			open, atName = open[:len(open)-1], false
		case ',':
			atName = open[len(open)-1] >= 0
		case '"':
			end := i + stringEnd(b[i:])
			if atName {
				name := plainName(b[i:end])
				for _, other := range names[open[len(open)-1]:] {
					if bytes.EqualFold(name, other) {
						return name
					}
				}
				names, atName = append(names, name), false
			}
			i = end - 1
		}
	}
	return nil
}

// stringEnd is the length of the JSON string that b begins with.
func stringEnd(b []byte) int {
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return len(b)
}

// plainName is the text of a JSON string.
func plainName(quoted []byte) []byte {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1]
	}
	var s string
	if err := json.Unmarshal(quoted, &s); err != nil {
		return quoted // it was decoded before: this does not happen
	}
	return []byte(s)
}

// loneSurrogate finds half of a pair of escapes in JSON.
func loneSurrogate(b []byte) bool {
	for {
		i := bytes.IndexByte(b, '\\')
		if i < 0 || len(b) < i+2 {
			return false
		}
		if b = b[i:]; b[1] != 'u' {
			b = b[2:]
			continue
		}
		high := escaped(b)
		b = b[2:]
		if !utf16.IsSurrogate(high) {
			continue
		}
		if b = b[min(4, len(b)):]; utf16.DecodeRune(high, escaped(b)) == utf8.RuneError {
			return true
		}
		b = b[6:]
	}
}

// escaped is the character of an escape as \u20ac, or -1.
func escaped(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	n, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return rune(n)
}
