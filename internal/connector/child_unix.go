//go:build unix && !linux

package connector

import "syscall"

// ownGroup keeps the terminal's Ctrl-C away from the connector: we end it.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
