package load

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// CPU is the processor time that the control groups of processes have used so far: for
// the first process of a container, that of the whole container.
func CPU(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		used, err := cpu(pid)
		if err != nil {
			return 0, fmt.Errorf("reading the processor time of process %d: %w", pid, err)
		}
		sum += used
	}
	return sum, nil
}

func cpu(pid int) (time.Duration, error) {
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return 0, err
	}
	const root = "/sys/fs/cgroup"
	unified := ""
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // cgroups(7)
		if len(parts) != 3 {
			continue
		}
		if parts[0] == "0" {
			unified = parts[2]
		}
		for _, controller := range strings.Split(parts[1], ",") {
			if controller == "cpuacct" { // version 1
				text, err := os.ReadFile(filepath.Join(root, "cpuacct", parts[2], "cpuacct.usage"))
				if err != nil {
					return 0, err
				}
				nanoseconds, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
				return time.Duration(nanoseconds), err
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(root, unified, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
			microseconds, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return time.Duration(microseconds) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s has no usage_usec", filepath.Join(root, unified, "cpu.stat"))
}
