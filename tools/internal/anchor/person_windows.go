package anchor

import "os/exec"

// person is nobody on Windows, where no browser has a database that is served.
type person struct{ home string }

func people() ([]person, error) { return nil, nil }

func (person) run(*exec.Cmd) {}
