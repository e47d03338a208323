package store

import "testing"

// SetQuota gives the members that are opened from now on a small quota.
func SetQuota(t *testing.T, n int64) {
	t.Helper()
	testOnlyQuota = n
	t.Cleanup(func() { testOnlyQuota = 0 })
}
