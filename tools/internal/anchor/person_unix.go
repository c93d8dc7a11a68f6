//go:build unix

package anchor

import (
	"fmt"
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
func people() ([]person, error) {
	var found []person
	var problem error
	if name := os.Getenv("SUDO_USER"); name != "" && name != "root" && os.Geteuid() == 0 {
		caller, err := sudoCaller(name)
		if err != nil {
			problem = fmt.Errorf("looking for the home of SUDO_USER: %w", err)
		} else {
			found = append(found, caller)
		}
	}
	if home, err := os.UserHomeDir(); err == nil && (len(found) == 0 || found[0].home != home) {
		found = append(found, person{home: home})
	}
	return found, problem
}

func sudoCaller(name string) (person, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return person{}, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return person{}, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return person{}, err
	}
	return person{home: u.HomeDir, as: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}, nil
}

func (p person) run(cmd *exec.Cmd) {
	if p.as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	}
}
