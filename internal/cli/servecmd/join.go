package servecmd

import (
	"context"

	"github.com/kmsctl/kmsctl/internal/connector"
	"github.com/kmsctl/kmsctl/internal/fault"
	"github.com/kmsctl/kmsctl/internal/hsm"
	"github.com/kmsctl/kmsctl/internal/kms"
)

// join makes next, the token to which keys can move, the successor of the one
// that first opens. When all have moved, next does alone: the other may be
// gone, and over is told so. What is not given is closed.
func join(ctx context.Context, plain kms.Plain, next *connector.Client, first func() (*connector.Client, error), over func(label string)) (out *connector.Client, err error) {
	var token *connector.Client
	defer func() {
		for _, c := range []*connector.Client{next, token} {
			if c != nil && c != out && (out == nil || out.Next() != c) {
				c.Close()
			}
		}
	}()
	stands, err := kms.Stands(ctx, plain)
	if err != nil {
		return nil, err
	}
	info, err := next.Describe(ctx)
	if err != nil {
		return nil, err
	}
	var same error
	if token, err = first(); err == nil {
		same = different(ctx, token, info)
	}
	switch {
	case same != nil:
		return nil, same
	case stands.Serial == info.Serial && len(stands.Left) == 0:
		over(info.Label)
		return next, nil
	case err != nil:
		return nil, err
	}
	token.Succeed(next, info.Serial)
	return token, nil
}

func different(ctx context.Context, token *connector.Client, other hsm.TokenInfo) error {
	info, err := token.Describe(ctx)
	if err == nil && info.Serial == other.Serial {
		err = fault.Newf(fault.Usage, "serve with two tokens", info.Label, "the settings of the first and of the second HSM name the same one").
			WithHint("a second SoftHSM token has a label of its own: `kmsctl render overrides --model softhsm --token-label NAME`")
	}
	return err
}
