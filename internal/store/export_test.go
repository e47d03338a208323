package store

import "testing"

// SetQuota gives the members that are opened from now on a small quota.
func SetQuota(t *testing.T, n int64) {
	t.Helper()
	testOnlyQuota = n
	t.Cleanup(func() { testOnlyQuota = 0 })
}

// QuotaOf is what a member may hold on a volume of a size.
func QuotaOf(volume int64) int64 { return quotaOf(volume) }

// StopAsLearner stops members that join, before they have a vote.
func StopAsLearner(err error) (undo func()) {
	testOnlyLearning = func() error { return err }
	return func() { testOnlyLearning = nil }
}

const KeepParsedForTest = keepParsed

// ParsedForTest counts the records of a folder that are kept parsed.
func (s *Store) ParsedForTest(dir string) (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, e := range s.kv[dir] {
		if e.json != nil && e.json.at.Load() != nil {
			n++
		}
	}
	return n
}
