package servecmd

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/kmsctl/kmsctl/internal/audit"
	"github.com/kmsctl/kmsctl/internal/cli/app"
	"github.com/kmsctl/kmsctl/internal/kms"
	"github.com/kmsctl/kmsctl/internal/server"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

const (
	// endedReason is what /readyz says between a clearing's two halves, and when
	// a restore begins.
	endedReason = "the application data are being cleared or restored"
	drainTime   = 10 * time.Second
)

// Ended is closed when the KMS must be closed and opened again: its data are
// being cleared or restored.
func (k *KMS) Ended() <-chan struct{} { return k.store.Ended() }

// CloseEnded closes a KMS that has ended: nobody gets in any
// more, and who is in gets an answer.
func (k *KMS) CloseEnded(g *server.Gate) {
	g.Close(endedReason, drainTime)
	k.Close()
}

func (k *KMS) clearing() *kms.Clearing {
	c := &kms.Clearing{Store: k.store, Plain: k.plain, Sealer: k.Token, Opened: k.Opened, Now: k.kms.Time, Moving: k.Token.Next() != nil}
	for _, m := range k.Token.Members() {
		c.Tokens = append(c.Tokens, m)
	}
	return c
}

// noteCleared writes down that the clearing before this opening was finished;
// who asked for it stands in the log already.
func (k *KMS) noteCleared(ctx context.Context, c *kmsapi.Cleared) error {
	if c == nil {
		return nil
	}
	k.Log.Info("cleared", "install", c.Installation, "by", c.By, "objects", c.Objects)
	return k.audit.Append(ctx, audit.Event{Action: "kmsctl.clear.finish", Outcome: "success", Status: http.StatusNoContent, Principal: c.By,
		Detail: fmt.Sprintf("installation %s, token %s, %d objects", c.Installation, c.TokenSerial, c.Objects)})
}

// noteMoved writes down that the store began anew on another token.
func (k *KMS) noteMoved(ctx context.Context, m *kms.Moved) error {
	if m == nil {
		return nil
	}
	k.Log.Info("moved to another token", "was", m.Install, "install", k.Opened.Install, "from", m.From, "to", m.To)
	return k.audit.Append(ctx, audit.Event{Action: "kmsctl.clear.move", Outcome: "success", Status: http.StatusNoContent, Principal: m.By,
		Detail: fmt.Sprintf("installation %s, token %s, to installation %s, token %s", m.Install, m.From, k.Opened.Install, m.To)})
}

// ClearAsked says what clear_data in the settings comes to: nothing is ever
// cleared by a start.
func (k *KMS) ClearAsked(ctx context.Context, how string) (string, error) {
	c := k.clearing()
	p, err := c.Plan(ctx)
	if err != nil {
		return "", err
	}
	if p.Cleared == nil && !p.Empty() {
		return "clear_data is asked for, and a start clears nothing: see what would go, and confirm it, with `" + how + "`", nil
	}
	done, err := c.Settle(ctx, "serve")
	return app.Settled(done), err
}
