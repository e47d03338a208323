package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Removals calls each for every object that the log says was deleted, purged,
// destroyed or disabled after since, with a sentence that says when and by
// whom. It reads whatever follows the form of a line, and checks no chain:
// see Verify for that.
func Removals(r io.Reader, since time.Time, each func(id, why string)) error {
	br := bufio.NewReaderSize(r, 1<<16)
	for n := 1; ; n++ {
		text, err := br.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(text) == 0 {
			return nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		var ln line
		if json.Unmarshal(text, &ln) != nil || ln.Event == nil || ln.Event.Outcome != "success" || ln.Time.Before(since) || !slices.Contains(removing, ln.Event.Action) {
			continue
		}
		id := ln.Event.Key
		if id == "" {
			id = ln.Event.Instance
		}
		if id != "" {
			each(id, fmt.Sprintf("%s by %s at %s (audit log, line %d)", ln.Event.Action, ln.Event.Principal, ln.Time.Format(time.RFC3339), n))
		}
	}
}

// removing are the actions after which what they name must not come back by
// itself. Deleting an alias or a ring removes no key.
var removing = []string{
	"kms.secrets.delete", "kms.secrets.purge", "kms.secrets.disable", "kmsctl.instances.delete",
	"iam.service-ids.delete", "iam.api-keys.delete", "iam.policies.delete",
}
