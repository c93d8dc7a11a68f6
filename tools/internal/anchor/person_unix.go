//go:build unix

package anchor

import (
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
)

// person is somebody whose browsers are served.
type person struct {
	home string
	as   *syscall.Credential // nil: as this process
}

// people are the user of this process and, if that is root by way of sudo, whoever
// called sudo. What is theirs is read and written with their rights alone, so it
// stays theirs, and a link in their home leads nowhere that they could not go.
func people() []person {
	var found []person
	if name := os.Getenv("SUDO_USER"); name != "" && os.Geteuid() == 0 {
		if u, err := user.Lookup(name); err == nil && u.Uid != "0" {
			uid, errUID := strconv.ParseUint(u.Uid, 10, 32)
			gid, errGID := strconv.ParseUint(u.Gid, 10, 32)
			if errUID == nil && errGID == nil {
				found = append(found, person{home: u.HomeDir, as: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}})
			}
		}
	}
	if home, err := os.UserHomeDir(); err == nil && (len(found) == 0 || found[0].home != home) {
		found = append(found, person{home: home})
	}
	return found
}

func (p person) run(cmd *exec.Cmd) {
	if p.as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	}
}
