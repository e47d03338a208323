package file

import (
	"os"
	"os/exec"
	"path/filepath"
)

// Program says where a program that belongs to this one is: where variable of
// the environment names it, else beside this program, else in PATH. The error
// is the system's own.
func Program(getenv func(string) string, variable, name string) (string, error) {
	if p := getenv(variable); p != "" {
		_, err := os.Stat(p)
		return p, err
	}
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return exec.LookPath(name)
}
