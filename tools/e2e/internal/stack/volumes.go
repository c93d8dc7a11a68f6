package stack

import (
	"strings"

	"github.com/stretchr/testify/require"
)

// Rendered are the volumes that nobody but the one-shots writes to.
var Rendered = []string{"root-ca", "step-ca-config", "step-ca-certs", "step-ca-secrets", "allow-list", "trust"}

// Snapshot lists every file in the volumes with its time, mode, owner, size and
// SHA-256. Equal snapshots mean that nothing was written. The volumes' own times are
// left out: Docker sets that of an empty one whenever a container mounts it.
func (s *Stack) Snapshot(volumes ...string) string {
	s.t.Helper()
	return s.InVolumes(`find . -mindepth 2 -printf '%p %y %T@ %m %U:%G %s\n' | sort; find . -type f -exec sha256sum {} + | sort -k 2`, volumes...)
}

// Files lists the files in the volumes.
func (s *Stack) Files(volumes ...string) []string {
	s.t.Helper()
	return strings.Fields(s.InVolumes("find . -type f | sort", volumes...))
}

// InVolumes runs a script as root where each volume is a read-only directory.
func (s *Stack) InVolumes(script string, volumes ...string) string {
	s.t.Helper()
	var mounts []string
	for _, v := range volumes {
		mounts = append(mounts, s.Volume(v)+":/here/"+v+":ro")
	}
	return s.script(script, mounts...)
}

// WithDirectory runs a script as root, and with the client's programs, in a
// directory of this machine.
func (s *Stack) WithDirectory(dir, script string) {
	s.t.Helper()
	s.script(script, dir+":/here")
}

func (s *Stack) script(script string, mounts ...string) string {
	s.t.Helper()
	require.NoError(s.t, buildClient())
	args := []string{"run", "--rm", "--network", "none", "--label", label + "=" + s.Project, "--workdir", "/here"}
	for _, m := range mounts {
		args = append(args, "--volume", m)
	}
	return Docker(s.t, append(args, clientImage, "bash", "-euo", "pipefail", "-c", script)...).OK(s.t).Stdout
}

// Volume is Docker's name of a volume.
func (s *Stack) Volume(name string) string { return s.Project + "_" + name }

// DropVolumes deletes volumes of a stack that is down.
func (s *Stack) DropVolumes(names ...string) {
	s.t.Helper()
	for _, name := range names {
		Docker(s.t, "volume", "rm", s.Volume(name)).OK(s.t)
	}
}
