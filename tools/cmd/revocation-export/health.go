package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// healthy tells whether relying parties get what they need. An expired CRL makes
// them refuse every certificate, so it is looked at in the file that they get.
func healthy(out, state string, limit time.Duration, now time.Time) error {
	const hint = "docker compose logs revocation-export"
	list, err := readCRL(filepath.Join(out, crlFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return oneshot.WithHint(errors.New("no CRL has been published yet"), hint)
	case err != nil:
		return err
	case list == nil:
		return oneshot.WithHint(errors.New("what is published is not a CRL"), hint)
	}
	if err := inTime(list, now); err != nil {
		return oneshot.WithHint(fmt.Errorf("checking the published CRL: %w", err), hint)
	}
	if _, err := os.Stat(filepath.Join(out, krlFile)); err != nil {
		return oneshot.WithHint(fmt.Errorf("looking for the KRL: %w", err), hint)
	}
	last, err := os.Stat(state)
	if err != nil {
		return oneshot.WithHint(fmt.Errorf("looking for the last complete round: %w", err), hint)
	}
	if ago := now.Sub(last.ModTime()); ago > limit {
		return oneshot.WithHint(fmt.Errorf("the last complete round was %s ago, more than %s", ago.Round(time.Second), limit), hint)
	}
	return nil
}
