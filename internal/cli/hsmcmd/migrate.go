package hsmcmd

import (
	"github.com/spf13/cobra"

	"github.com/kmsctl/kmsctl/internal/cli/app"
)

const migrate = "migrate"

func newMigrateCmd(a *app.App) *cobra.Command {
	cmd := &cobra.Command{Use: migrate, Short: "Move all keys to another HSM, while the KMS serves", Long: `Move all keys to another HSM, while both are reachable.

An embedded KMS moves to an HSM of the same model or not. Serve with both: --secret and --values
of the old one, --to-secret and --to-values of the new one. Then start the move. When it is done,
serve with the two files of the new one as --secret and --values.

A release in a cluster moves to an HSM of the same model, softhsm or gemalto. Put the new one's
password (and certificates) into a Secret of its own, hsm-secret-next, with the keys of
hsm-secret. Upgrade with the new one's settings as the block migration.hsm of the values: each
pod of the API then has a connector of either. Start the move with --in-cluster-service. When
status says done, upgrade once more: what was in migration.hsm becomes hsm, its secretName with
it, and the block goes. Until the move is started an upgrade with the values of before takes
all back; after that pods with one of the two alone are not ready, and lose nothing.

Each root key is wrapped by RSA-OAEP in the old token, under a public key whose private half
the new token made and holds, and is unwrapped there: it is in the clear nowhere else. Key ids
and ciphertexts stay what they are. The move is rehearsed with keys of its own first, and is
refused when the tokens have no way in common, or when the new one does not open what the old
one encrypted. From then on new keys are made in the new token, and both are needed until the
job is done. It can be stopped, goes on after a crash, and cannot be turned back: moving back
is a move too.

A key that stays in its token by its instance's placement cannot move. Where there is one the
move is refused and names it, unless --leave-placed is given: such a key is not destroyed, but
can be used after the move no more, except with the old token and a backup from before.

The old token keeps its master keys, since a backup from before the move needs them: restore it
with the old token, and move again. One from after it needs the new token. One that was made
during the move cannot be restored. Import tokens whose pair is in the old token end.`}
	cmd.AddCommand(
		newRotateVerb(a, migrate, "start", "Begin, or go on with what was stopped", `  kmsctl serve --data ./kms --secret old.yaml --values old_hsm.yaml --to-secret new.yaml --to-values new_hsm.yaml
  kmsctl hsm migrate start --data ./kms --wait
  kmsctl hsm migrate start --data ./kms --leave-placed
  kmsctl hsm migrate start --in-cluster-service --api-key-file admin.key --wait`),
		newRotateVerb(a, migrate, "status", "Show in which token the master keys are, and how far it is", `  kmsctl hsm migrate status --data ./kms
  kmsctl hsm migrate status --server https://kms:28674 --api-key-file admin.key -o json
  kmsctl hsm migrate status --data ./kms --wait --timeout 10m`),
		newRotateVerb(a, migrate, "stop", "Let it rest; start goes on with it", `  kmsctl hsm migrate stop --data ./kms`),
	)
	return cmd
}
