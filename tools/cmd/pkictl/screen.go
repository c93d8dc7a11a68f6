package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
)

// problem is something that is wrong, and the way out.
type problem struct {
	What string `json:"what"`
	Do   string `json:"do,omitempty"`
}

// problems collects them.
type problems []problem

func (p *problems) add(what, do string) { *p = append(*p, problem{what, do}) }

// err adds an error with its hints.
func (p *problems) err(err error) { p.add(err.Error(), strings.Join(oneshot.Hints(err), "; ")) }

// screen is what a status shows to people: a line for each thing, then what is wrong.
type screen struct{ rows [][]string }

func (s *screen) row(cells ...string) { s.rows = append(s.rows, cells) }

// print shows all of it. The error counts the problems.
func (s *screen) print(found problems) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, cells := range s.rows {
		_, _ = fmt.Fprintln(w, strings.TrimRight(strings.Join(cells, "\t"), "\t")) // Flush tells
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("printing the status: %w", err)
	}
	red, green := paint("31"), paint("32")
	if len(found) == 0 {
		fmt.Println("\n" + green("all is well"))
		return nil
	}
	for _, p := range found {
		fmt.Println("\n" + red("wrong: ") + p.What)
		if p.Do != "" {
			fmt.Println("do:    " + p.Do)
		}
	}
	return wrong(found)
}

// wrong is the error of a status that found something.
func wrong(found problems) error {
	switch len(found) {
	case 0:
		return nil
	case 1:
		return errors.New("something is wrong")
	}
	return fmt.Errorf("%d things are wrong", len(found))
}

// paint colours text for a terminal, unless the user wants none (https://no-color.org).
func paint(code string) func(string) string {
	if os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" || !term.IsTerminal(int(os.Stdout.Fd())) {
		return func(s string) string { return s }
	}
	return func(s string) string { return "\x1b[" + code + "m" + s + "\x1b[0m" }
}

// span is a duration in its two largest units.
func span(d time.Duration) string {
	d = d.Abs()
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd %dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh %dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm %ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}
