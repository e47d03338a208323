package kube

import "context"

// LastSaid is lastSaid, for the tests.
func LastSaid(lines ...string) (text, hint, kind string) {
	s := lastSaid(lines)
	return s.text, s.hint, s.kind
}

// IsEstablished is isEstablished, for the tests.
var IsEstablished = isEstablished

// RunningPod is runningPod, for the tests.
func (c *Cluster) RunningPod(ctx context.Context, e Exec) (string, []string, error) {
	return c.runningPod(ctx, e)
}
