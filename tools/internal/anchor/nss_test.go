package anchor

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWhoeverCalledSudoAndIsNotKnownHereIsTold(t *testing.T) {
	if os.Geteuid() != 0 {
		const advice = "sudo makes root of somebody: run the tests as root"
		if os.Getenv("CI") != "" {
			t.Fatal(advice)
		}
		t.Skip(advice)
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("SUDO_USER", "in-a-directory-elsewhere")
	states := Status(t.Context(), strings.Repeat("0", 64), NSS)
	require.Equal(t, []State{{
		Store: NSS, State: Absent,
		Why:  "looking for the home of SUDO_USER: user: unknown user in-a-directory-elsewhere",
		Hint: "whoever it is can run this with --stores nss, without sudo",
	}}, states)
}
