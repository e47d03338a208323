package audit

// ComingForTest are the calls that are still expected.
func (l *Log) ComingForTest() int64 { return l.coming.Load() }
