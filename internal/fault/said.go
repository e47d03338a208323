package fault

import (
	"errors"
	"strconv"
	"strings"
)

// Said is an error as programs tell it to scripts and to each other.
type Said struct {
	Kind    string `json:"kind"`
	Message string `json:"message"`
	Object  string `json:"object,omitempty"`
	Hint    string `json:"hint,omitempty"`
}

// Say puts an error into that form.
func Say(err error) Said {
	return Said{Kind: KindOf(err).String(), Message: err.Error(), Object: ObjectOf(err), Hint: HintOf(err)}
}

// Err is the error again, for who was told: in the same words, of the same
// kind, on the same object, with the same hint.
func (s Said) Err() error {
	kind := KindNamed(s.Kind)
	op, cause, _ := strings.Cut(s.Message, strconv.Quote(s.Object)+": ")
	if e := New(kind, strings.TrimSuffix(op, " "), s.Object, errors.New(cause)); e.Error() == s.Message {
		return e.WithHint("%s", s.Hint)
	}
	return New(kind, "", "", errors.New(s.Message)).WithHint("%s", s.Hint)
}
