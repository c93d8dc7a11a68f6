// Package load drives a CA as many clients at once do, and remembers what each of them
// was told.
//
// The loop is closed: a client asks again as soon as it has its answer, so what is
// measured is what the CA can do, and the times are those that its clients feel then.
package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/acme"
)

const (
	// Patience is how long a client waits for the whole of an answer.
	Patience = 15 * time.Second

	// orderPatience is how long it waits for an ACME order, which is seven answers.
	orderPatience = time.Minute

	// A client whose request has failed waits before the next one: refused connections
	// cost nothing, and thousands of them would hide what else fails.
	pause = 100 * time.Millisecond
)

// Operation is one request, from the connection to the end of the answer. The serial is
// that of the certificate that was asked for, "" where none was: with it the CA has
// acknowledged the certificate. Nothing is tried twice.
type Operation func(context.Context) (serial string, err error)

// Sample is one request and what became of it.
type Sample struct {
	Began  time.Time
	Took   time.Duration
	Serial string // decimal
	Err    error
}

// Outcome is all that was asked in a run.
type Outcome struct {
	Began, Ended time.Time
	Samples      []Sample // in the order in which they began
}

// Run gives each operation to a client of its own, which repeats it until the context
// ends. What is under way then is brought to its end.
func Run(ctx context.Context, clients []Operation) Outcome {
	o := Outcome{Began: time.Now()}
	of := make([][]Sample, len(clients))
	var wg sync.WaitGroup
	for i, operation := range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				one := once(ctx, operation)
				of[i] = append(of[i], one)
				if one.Err == nil {
					continue
				}
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	wg.Wait()
	o.Ended = time.Now()
	o.Samples = slices.Concat(of...)
	slices.SortFunc(o.Samples, func(a, b Sample) int { return a.Began.Compare(b.Began) })
	return o
}

func once(ctx context.Context, operation Operation) Sample {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), Patience)
	defer cancel()
	s := Sample{Began: time.Now()}
	s.Serial, s.Err = operation(ctx)
	s.Took = time.Since(s.Began)
	return s
}

// Acknowledged are the serials of all certificates that clients were given.
func (o Outcome) Acknowledged() []string {
	var serials []string
	for _, s := range o.Samples {
		if s.Err == nil && s.Serial != "" {
			serials = append(serials, s.Serial)
		}
	}
	return serials
}

// Failed are the requests that did not succeed.
func (o Outcome) Failed() []Sample {
	var failed []Sample
	for _, s := range o.Samples {
		if s.Err != nil {
			failed = append(failed, s)
		}
	}
	return failed
}

// Rate is how many requests succeeded in a second.
func (o Outcome) Rate() float64 {
	return float64(len(o.Samples)-len(o.Failed())) / o.Ended.Sub(o.Began).Seconds()
}

// Quantile is the time within which a part of the successful requests was answered:
// 0.5 for the median. It is 0 if none succeeded.
func (o Outcome) Quantile(part float64) time.Duration {
	var took []time.Duration
	for _, s := range o.Samples {
		if s.Err == nil {
			took = append(took, s.Took)
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[min(int(part*float64(len(took))), len(took)-1)]
}

// Gap is the longest time in which no request succeeded.
func (o Outcome) Gap() time.Duration {
	answered := []time.Time{o.Began, o.Ended}
	for _, s := range o.Samples {
		if s.Err == nil {
			answered = append(answered, s.Began.Add(s.Took))
		}
	}
	slices.SortFunc(answered, time.Time.Compare)
	var gap time.Duration
	for i := range len(answered) - 1 {
		gap = max(gap, answered[i+1].Sub(answered[i]))
	}
	return gap
}

// Reasons tells how requests failed, the most frequent way first: "12 × status 500".
func Reasons(failed []Sample) string {
	count := map[string]int{}
	for _, s := range failed {
		count[reason(s.Err)]++
	}
	names := slices.Sorted(maps.Keys(count))
	slices.SortStableFunc(names, func(a, b string) int { return count[b] - count[a] })
	for i, name := range names {
		names[i] = fmt.Sprintf("%d × %s", count[name], name)
	}
	return strings.Join(names, ", ")
}

// StatusError is an answer that says no.
type StatusError struct {
	Code int
	Body string
}

func (e *StatusError) Error() string { return fmt.Sprintf("status %d: %s", e.Code, e.Body) }

const noAnswer = "no answer in time"

func reason(err error) string {
	if status, ok := errors.AsType[*StatusError](err); ok {
		return fmt.Sprint("status ", status.Code)
	}
	if problem, ok := errors.AsType[*acme.Error](err); ok {
		return fmt.Sprint("status ", problem.StatusCode)
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return noAnswer
	}
	// The end of a connection whose answer step-ca has given up, after 15 s: its record is
	// numbered as if the answer had been sent (golang/go#47229).
	if strings.Contains(err.Error(), "tls: bad record MAC") {
		return "answer given up by step-ca"
	}
	for _, known := range []struct {
		err error
		how string
	}{
		{syscall.ECONNREFUSED, "connection refused"},
		{syscall.ECONNRESET, "connection reset"},
		{syscall.EPIPE, "connection reset"},
		{syscall.EHOSTUNREACH, "no route"},
		{io.EOF, "connection closed"},
		{io.ErrUnexpectedEOF, "connection closed"},
		{os.ErrDeadlineExceeded, noAnswer},
	} {
		if errors.Is(err, known.err) {
			return known.how
		}
	}
	return err.Error()
}
