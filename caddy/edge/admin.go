package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"text/tabwriter"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

const (
	defaultAdmin = "unix//run/edge/admin.sock"

	upstreamsPath = "/edge/upstreams"
	drainPath     = "/edge/drain"
	undrainPath   = "/edge/undrain"
)

// Admin is the part of the admin API that knows the replicas.
type Admin struct{}

// CaddyModule returns the Caddy module information.
func (*Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.edge",
		New: func() caddy.Module { return new(Admin) },
	}
}

// Routes returns what the API answers to.
func (*Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: upstreamsPath, Handler: asJSON(http.MethodGet, func(_ *http.Request) (any, error) { return allStatuses(), nil })},
		{Pattern: drainPath, Handler: asJSON(http.MethodPost, drain)},
		{Pattern: undrainPath, Handler: asJSON(http.MethodPost, undrain)},
	}
}

func asJSON(method string, f func(*http.Request) (any, error)) caddy.AdminHandler {
	return caddy.AdminHandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		if r.Method != method {
			return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: errors.New("method not allowed")}
		}
		result, err := f(r)
		if err != nil {
			return err
		}
		w.Header().Set("Content-Type", "application/json")
		return json.NewEncoder(w).Encode(result)
	})
}

func allStatuses() []Status {
	all := []Status{}
	for _, p := range openPools() {
		list, _ := p.statuses()
		all = append(all, list...)
	}
	return all
}

type drainRequest struct {
	Address netip.Addr    `json:"address"`
	For     time.Duration `json:"for,omitempty"` // nanoseconds
}

// drainAnswer says what became of a drain.
type drainAnswer struct {
	Unknown bool `json:"unknown,omitempty"`  // no such replica
	OnlyOne bool `json:"only_one,omitempty"` // refused
}

func drain(r *http.Request) (any, error) {
	req, err := readDrainRequest(r)
	if err != nil {
		return nil, err
	}
	for _, p := range openPools() {
		switch err := p.drain(req.Address, time.Now().Add(req.For)); {
		case err == nil:
			return drainAnswer{}, nil
		case errors.Is(err, errOnlyOne):
			return drainAnswer{OnlyOne: true}, nil
		}
	}
	return drainAnswer{Unknown: true}, nil
}

func undrain(r *http.Request) (any, error) {
	req, err := readDrainRequest(r)
	if err != nil {
		return nil, err
	}
	for _, p := range openPools() {
		p.undrain(req.Address)
	}
	return drainAnswer{}, nil
}

func readDrainRequest(r *http.Request) (req drainRequest, err error) {
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<10)).Decode(&req); err != nil {
		return req, caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: fmt.Errorf("reading the request: %w", err)}
	}
	return req, nil
}

// callAdmin asks the admin API and decodes its answer.
func callAdmin(ctx context.Context, address, method, path string, request, result any) error {
	var body io.Reader
	if request != nil {
		encoded, err := json.Marshal(request)
		if err != nil {
			return err
		}
		body = bytes.NewReader(encoded)
	}
	type reply struct {
		resp *http.Response
		err  error
	}
	// AdminAPIRequest takes no context.
	done := make(chan reply, 1)
	go func() {
		resp, err := caddycmd.AdminAPIRequest(address, method, path, nil, body) //nolint:bodyclose // below
		done <- reply{resp, err}
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-done:
		if r.err != nil {
			return r.err
		}
		defer func() { _ = r.resp.Body.Close() }()
		return json.NewDecoder(r.resp.Body).Decode(result)
	}
}

// Exit codes besides 1, which cobra gives to any error.
const (
	exitUsage   = 2
	exitRefused = 3
)

// codedError is an error with an exit code of its own.
type codedError struct {
	error
	code int
}

func (e *codedError) Unwrap() error { return e.error }

// command makes a command that reports errors in this project's form.
func command(cmd *cobra.Command, run func(cmd *cobra.Command, args []string) error) {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		if err == nil {
			return nil
		}
		cmd.SilenceErrors = true // cobra's own line has another form
		report(cmd, err)
		if coded, ok := errors.AsType[*codedError](err); ok {
			return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return coded.code, nil })(cmd, args)
		}
		return err
	}
}

// report prints an error and the way out of it.
func report(cmd *cobra.Command, err error) {
	_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "%s: error: %v\n", cmd.CommandPath(), err)
	if hinted, ok := errors.AsType[*hintError](err); ok {
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "%s: hint: %s\n", cmd.CommandPath(), hinted.hint)
	}
}

// replicaCommand is what the commands have in common.
type replicaCommand struct {
	admin string        // address of the admin API, as Caddy writes it
	wait  time.Duration // for the wanted state
}

const pollInterval = 200 * time.Millisecond

func (c *replicaCommand) adminFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.admin, "admin", defaultAdmin, "`address` of the admin API")
}

func (c *replicaCommand) call(ctx context.Context, method, path string, request, result any) error {
	if err := callAdmin(ctx, c.admin, method, path, request, result); err != nil {
		return &hintError{err, "caddy has to run with this admin API; see: docker compose ps caddy"}
	}
	return nil
}

// poll asks for the replica until it is as wanted, and reports what it was at
// last, which is nil when it was not there.
func (c *replicaCommand) poll(ctx context.Context, addr netip.Addr, wanted func(*Status) bool) (*Status, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, c.wait)
	defer cancel()
	var last *Status
	for {
		var all []Status
		// Not bounded by the wait: without any, one look is due.
		if err := c.call(context.WithoutCancel(ctx), http.MethodGet, upstreamsPath, nil, &all); err != nil {
			return nil, false, err
		}
		last = nil
		for _, s := range all {
			if s.Address == addr.String() {
				last = &s
			}
		}
		if wanted(last) {
			return last, true, nil
		}
		if !sleep(ctx, pollInterval, nil) {
			return last, false, nil
		}
	}
}

func oneAddress(args []string) (netip.Addr, error) {
	if len(args) != 1 {
		return netip.Addr{}, &codedError{&hintError{errors.New("want one address"), "caddy upstreams lists them"}, exitUsage}
	}
	addr, err := netip.ParseAddr(args[0])
	if err != nil {
		return netip.Addr{}, &codedError{&hintError{fmt.Errorf("address %q: want one such as 172.20.0.5", args[0]), "caddy upstreams lists them"}, exitUsage}
	}
	return addr, nil
}

func upstreamsCommand() caddycmd.Command {
	var c replicaCommand
	var printJSON bool
	return caddycmd.Command{
		Name:  "upstreams",
		Short: "Lists the replicas of the CA",
		Long: `Lists the replicas that the edge knows, with their state:

ready     serves and reaches its database
alive     serves; what needs the database fails
out       does not serve
draining  gets no new connection`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Use = "upstreams [flags]"
			cmd.Example = "  caddy upstreams\n  caddy upstreams --json"
			cmd.Args = cobra.NoArgs
			c.adminFlag(cmd)
			cmd.Flags().BoolVar(&printJSON, "json", false, "print a JSON array")
			command(cmd, func(cmd *cobra.Command, _ []string) error {
				var all []Status
				if err := c.call(cmd.Context(), http.MethodGet, upstreamsPath, nil, &all); err != nil {
					return err
				}
				if printJSON {
					return json.NewEncoder(cmd.OutOrStdout()).Encode(all)
				}
				w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
				_, _ = fmt.Fprintln(w, "UPSTREAM\tADDRESS\tSTATE\tACTIVE\tLAST ERROR")
				for _, s := range all {
					_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", s.Upstream, s.Address, s.State, s.Active, s.Error)
				}
				return w.Flush()
			})
		},
	}
}

func drainCommand() caddycmd.Command {
	var c replicaCommand
	var lasts time.Duration
	return caddycmd.Command{
		Name:  "drain",
		Short: "Takes a replica of the CA out of service",
		Long: `Gives the replica no new connection and waits until it has none. When --wait is
over it says how many there still are, which is no failure. The drain is forgotten
after --for. The only replica in service is not drained: exit code 3.`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Use = "drain ADDRESS [flags]"
			cmd.Example = "  caddy drain 172.20.0.5\n  caddy drain 172.20.0.5 --for 10m --wait 1m"
			c.adminFlag(cmd)
			cmd.Flags().DurationVar(&lasts, "for", 3*time.Minute, "`time` after which the drain is forgotten")
			cmd.Flags().DurationVar(&c.wait, "wait", 20*time.Second, "`time` to wait for the last connection")
			command(cmd, func(cmd *cobra.Command, args []string) error {
				addr, err := oneAddress(args)
				if err != nil {
					return err
				}
				var result drainAnswer
				if err := c.call(cmd.Context(), http.MethodPost, drainPath, drainRequest{addr, lasts}, &result); err != nil {
					return err
				}
				switch {
				case result.Unknown:
					return &hintError{fmt.Errorf("%s: %w", addr, errUnknown), "caddy upstreams lists them"}
				case result.OnlyOne:
					return &codedError{&hintError{fmt.Errorf("%s: %w", addr, errOnlyOne), "caddy upstreams says what the others lack"}, exitRefused}
				}
				last, idle, err := c.poll(cmd.Context(), addr, func(s *Status) bool { return s == nil || s.Active == 0 })
				if err != nil {
					return err
				}
				active := 0
				if !idle {
					active = last.Active
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: draining, %d active\n", addr, active)
				return err
			})
		},
	}
}

func undrainCommand() caddycmd.Command {
	var c replicaCommand
	return caddycmd.Command{
		Name:  "undrain",
		Short: "Puts a replica of the CA back into service",
		Long: `Ends the drain of a replica and waits until its checks find it ready. It may be
starting: one that is not there yet is waited for too.`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Use = "undrain ADDRESS [flags]"
			cmd.Example = "  caddy undrain 172.20.0.5 --wait 2m"
			c.adminFlag(cmd)
			cmd.Flags().DurationVar(&c.wait, "wait", time.Minute, "`time` to wait for the replica")
			command(cmd, func(cmd *cobra.Command, args []string) error {
				addr, err := oneAddress(args)
				if err != nil {
					return err
				}
				if err := c.call(cmd.Context(), http.MethodPost, undrainPath, drainRequest{Address: addr}, &drainAnswer{}); err != nil {
					return err
				}
				last, isReady, err := c.poll(cmd.Context(), addr, func(s *Status) bool { return s != nil && s.State == ready })
				switch {
				case err != nil:
					return err
				case isReady:
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: ready\n", addr)
					return err
				case last == nil:
					return &hintError{fmt.Errorf("%s: %w", addr, errUnknown), "caddy upstreams lists them"}
				default:
					return &hintError{fmt.Errorf("%s is %s: %s", addr, last.State, last.Error), "see its log with: docker compose logs step-ca"}
				}
			})
		},
	}
}

var _ caddy.AdminRouter = (*Admin)(nil)
