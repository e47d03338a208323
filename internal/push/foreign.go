package push

import "context"

func (l *load) foreign(ctx context.Context) error { return nil }
