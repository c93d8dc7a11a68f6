package schedule

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// machine is a root file system with these directories, and a systemctl that notes how
// it is called: the real one works on the machine's own units only (tools/e2e has it).
// Its timer is on as soon as it was told to be.
func machine(t *testing.T, directories ...string) (s Schedule, called func() string) {
	t.Helper()
	s = Schedule{Binary: "/usr/local/bin/pkictl", Root: t.TempDir()}
	for _, d := range directories {
		require.NoError(t, os.MkdirAll(s.Root+d, 0o750))
	}
	notes, bin := filepath.Join(t.TempDir(), "notes"), t.TempDir()
	script := `#!/bin/sh
case "$1" in
is-*) grep -q enable ` + notes + ` 2>/dev/null;;
*) echo "$*" >>` + notes + `;;
esac
`
	require.NoError(t, os.WriteFile(filepath.Join(bin, "systemctl"), []byte(script), 0o700)) //nolint:gosec // G306: it must be executable
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	return s, func() string {
		text, err := os.ReadFile(notes)
		if err != nil {
			return ""
		}
		return string(text)
	}
}

func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			data, err := os.ReadFile(path) //nolint:gosec // G122: nobody else writes there
			files[strings.TrimPrefix(path, root)] = info.Mode().String() + "\n" + string(data)
			return err
		}
		return err
	}))
	return files
}

// said runs work and returns its log without levels.
func said(t *testing.T, work func(ctx context.Context, log *slog.Logger) error) string {
	t.Helper()
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
			return slog.Attr{}
		}
		return a
	}}))
	require.NoError(t, work(t.Context(), log))
	return out.String()
}

func TestInstallAndRemove(t *testing.T) {
	const systemd = "/run/systemd/system"
	tests := map[string]struct {
		directories []string
		kind        Kind
		files       []string
		calls       string
	}{
		"systemd, where it is the init system": {
			[]string{systemd, units, "/etc/cron.d"},
			Systemd,
			[]string{units + "/" + failed, units + "/" + service, units + "/" + timer},
			"daemon-reload\nenable --now " + timer + "\n",
		},
		"cron, where systemd is there and does not run":     {[]string{units, "/etc/cron.d"}, Cron, []string{cronLine}, ""},
		"busybox's crond, whose directory runs its scripts": {[]string{"/etc/periodic/15min"}, Cron, []string{periodic}, ""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s, called := machine(t, tc.directories...)
			install := func(ctx context.Context, log *slog.Logger) error {
				kind, err := s.Install(ctx, log)
				require.Equal(t, tc.kind, kind)
				return err
			}
			s.DryRun = true
			require.Contains(t, said(t, install), `msg="would be created" schedule=`)
			require.Empty(t, tree(t, s.Root))
			require.Empty(t, called())

			s.DryRun = false
			first := said(t, install)
			written := tree(t, s.Root)
			for _, path := range tc.files {
				require.Contains(t, first, "msg=created schedule="+path)
				require.Contains(t, written, path)
			}
			require.Len(t, written, len(tc.files))
			require.Equal(t, tc.calls, called())

			again := said(t, install)
			require.NotContains(t, again, "created")
			require.Contains(t, again, "msg=unchanged schedule="+tc.files[0])
			require.Equal(t, written, tree(t, s.Root))
			require.Equal(t, tc.calls, called())

			s.DryRun = true
			require.Contains(t, said(t, s.Remove), `msg="would be removed" schedule=`+tc.files[0])
			require.Equal(t, written, tree(t, s.Root))
			s.DryRun = false
			require.Contains(t, said(t, s.Remove), "msg=removed schedule="+tc.files[0])
			require.Empty(t, tree(t, s.Root))
			require.Empty(t, said(t, s.Remove))
		})
	}
}

func TestCronLine(t *testing.T) {
	s, _ := machine(t, "/etc/cron.d")
	s.Dir = "/srv/pki"
	_, err := s.Install(t.Context(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.Equal(t, `-rw-r--r--
# Written by pkictl: renews the certificates that are past two thirds of their life.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
*/15 * * * * root /usr/local/bin/pkictl renew --quiet --jitter 10m --dir /srv/pki
`, tree(t, s.Root)[cronLine])
}

func TestState(t *testing.T) {
	s, _ := machine(t, "/run/systemd/system", units)
	require.Equal(t, State{Problems: []string{"nothing runs renew"}}, s.State(t.Context()))
	_, err := s.Install(t.Context(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.Equal(t, State{Kind: Systemd, Active: true}, s.State(t.Context()))
}

func TestRefused(t *testing.T) {
	tests := map[string]struct {
		binary, dir, want string
	}{
		"a relative path":              {"./pkictl", "", `scheduling renewal: "./pkictl" is not an absolute path of letters, digits and ._/+@-; a good one: /usr/local/bin/pkictl`},
		"what systemd and cron expand": {"/opt/pki%h/pkictl", "", `scheduling renewal: "/opt/pki%h/pkictl" is not an absolute path of letters, digits and ._/+@-; a good one: /usr/local/bin/pkictl`},
		"a second command":             {"/bin/pkictl", "/etc/x; reboot", `scheduling renewal: "/etc/x; reboot" is not an absolute path of letters, digits and ._/+@-; a good one: /usr/local/bin/pkictl`},
		"a host that has nothing":      {"/bin/pkictl", "", "scheduling renewal: no systemd runs here, and there is neither /etc/cron.d nor /etc/periodic/15min"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s, _ := machine(t)
			s.Binary, s.Dir = tc.binary, tc.dir
			_, err := s.Install(t.Context(), slog.New(slog.DiscardHandler))
			require.EqualError(t, err, tc.want)
			require.Empty(t, tree(t, s.Root))
		})
	}
}

// systemd itself reads the units: an unknown key or section is a line of output.
func TestSystemdAcceptsTheUnits(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		const advice = "systemd-analyze is missing: apt-get install systemd"
		if os.Getenv("CI") != "" {
			t.Fatal(advice)
		}
		t.Skip(advice)
	}
	s, _ := machine(t, "/run/systemd/system", units)
	s.Binary = "/bin/true" // verify looks whether it can be executed
	_, err := s.Install(t.Context(), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	dir := s.Root + units
	for _, unit := range []string{timer, service, failed} {
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", filepath.Join(dir, unit)).CombinedOutput()
		require.NoError(t, err, string(out))
		require.Empty(t, string(out))
	}
}
