package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// What a replica is good for: the words in "caddy upstreams" and in the gauge.
const (
	ready    = "ready"    // it serves and reaches its database
	alive    = "alive"    // it serves; what needs the database fails
	out      = "out"      // it does not serve
	draining = "draining" // it is to get no new connection
)

// The times of the checks. A replica that freezes right after an answer is out
// checkInterval + checkTimeout later. step-ca logs the question about the
// database and not the one about health, hence the difference.
const (
	resolveInterval = time.Second            // between two looks at DNS
	resolvePause    = 250 * time.Millisecond // the least, while somebody waits for a replica
	resolveAbsent   = 30 * time.Second       // where the name has no address: it may be one that this stack does not have

	checkInterval = 2 * time.Second
	checkTimeout  = 1500 * time.Millisecond
	checkRetry    = 500 * time.Millisecond // while it is out

	databaseInterval = 10 * time.Second
	databaseTimeout  = 5 * time.Second
	databaseRetry    = 2 * time.Second // while it does not answer
)

// poolKey is what makes two handlers share a pool.
type poolKey struct{ host, port, root, serverName string }

// pools are those of all configurations, and with them what they know.
var pools = caddy.NewUsagePool()

// openPool starts to find and to check the replicas, or joins those who do.
func openPool(key poolKey) (*pool, error) {
	p, _, err := pools.LoadOrNew(key, func() (caddy.Destructor, error) { return startPool(key, net.DefaultResolver), nil })
	if err != nil {
		return nil, err
	}
	return p.(*pool), nil
}

// openPools returns those that are in use, in order of their names.
func openPools() []*pool {
	var open []*pool
	pools.Range(func(_, p any) bool {
		open = append(open, p.(*pool))
		return true
	})
	slices.SortFunc(open, func(a, b *pool) int { return strings.Compare(a.name(), b.name()) })
	return open
}

// pool is the replicas behind one name.
type pool struct {
	poolKey
	resolver *net.Resolver
	log      *zap.Logger
	stop     context.CancelFunc
	wanted   chan struct{} // somebody waits for a replica

	mu       sync.Mutex
	replicas map[netip.Addr]*replica
	drains   map[netip.Addr]time.Time // until when; outlives a restart of the replica
	known    bool                     // the name has resolved at least once
	turn     int                      // rotates among the equally busy
}

// replica is one address out of DNS.
type replica struct {
	addr  netip.Addr
	stop  context.CancelFunc
	again chan struct{} // ask for its health at once
	came  chan struct{} // it came back: ask about its database at once
	heard atomic.Int64  // when it last sent anything to a client, Unix nanoseconds

	// Under the pool's mutex.
	active      int
	alive       bool
	database    bool
	healthErr   error
	databaseErr error
}

func startPool(key poolKey, resolver *net.Resolver) *pool {
	ctx, stop := context.WithCancel(context.Background())
	p := &pool{
		poolKey: key, resolver: resolver, log: caddy.Log().Named("edge.upstream"), stop: stop,
		wanted:   make(chan struct{}, 1),
		replicas: make(map[netip.Addr]*replica), drains: make(map[netip.Addr]time.Time),
	}
	go p.follow(ctx)
	return p
}

// Destruct ends the checks, once no configuration uses the pool.
func (p *pool) Destruct() error {
	p.stop()
	return nil
}

// name is the upstream's, as an operator knows it.
func (p *pool) name() string { return strings.TrimSuffix(p.host, ".") }

// follow keeps the replicas as DNS has them.
func (p *pool) follow(ctx context.Context) {
	failing := false
	for {
		wait := resolveInterval
		lookup, cancel := context.WithTimeout(ctx, 2*time.Second)
		addrs, err := p.resolver.LookupNetIP(lookup, "ip4", p.host)
		cancel()
		for i := range addrs {
			addrs[i] = addrs[i].Unmap() // it returns IPv4 within IPv6
		}
		dnsErr, isDNS := errors.AsType[*net.DNSError](err)
		if ctx.Err() != nil {
			return
		}
		if err == nil || isDNS && dnsErr.IsNotFound {
			p.update(ctx, addrs)
			failing = false
		} else if !failing {
			// DNS is out of order, which says nothing about the replicas.
			failing = true
			p.log.Warn("resolving", zap.String("upstream", p.name()), zap.Error(err))
		}
		if p.empty() {
			wait = resolveAbsent
		}

		pause := time.NewTimer(resolvePause)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-p.wanted:
			select {
			case <-ctx.Done():
			case <-pause.C:
			}
		}
		pause.Stop()
		timer.Stop()
	}
}

func (p *pool) empty() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.replicas) == 0
}

// update makes addrs the replicas. One that is gone is forgotten; its connections
// go on.
func (p *pool) update(ctx context.Context, addrs []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = p.known || len(addrs) > 0
	for addr, r := range p.replicas {
		if !slices.Contains(addrs, addr) {
			r.stop()
			delete(p.replicas, addr)
			p.log.Info("replica is gone", zap.String("upstream", p.name()), zap.String("address", addr.String()))
		}
	}
	for _, addr := range addrs {
		if _, known := p.replicas[addr]; known {
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		r := &replica{addr: addr, stop: stop, again: make(chan struct{}, 1), came: make(chan struct{}, 1), healthErr: errNotChecked}
		p.replicas[addr] = r
		go p.watchHealth(ctx, r)
		go p.watchDatabase(ctx, r)
	}
	for addr, until := range p.drains {
		if time.Now().After(until) {
			delete(p.drains, addr)
			p.log.Info("drain is over", zap.String("upstream", p.name()), zap.String("address", addr.String()))
		}
	}
}

// watchHealth asks a replica for its health for as long as it is in DNS.
func (p *pool) watchHealth(ctx context.Context, r *replica) {
	for {
		start := time.Now()
		err := p.ask(ctx, r, checkTimeout, askHealth)
		if ctx.Err() != nil {
			return
		}
		// On a machine that is busy the answer may come late while clients are
		// served all along. One that is frozen serves nobody.
		if isTimeout(err) && r.heard.Load() > start.UnixNano() {
			err = nil
		}
		p.setHealth(r, err)
		wait := checkRetry
		if err == nil {
			wait = time.Until(start.Add(checkInterval))
		}
		if !sleep(ctx, wait, r.again) {
			return
		}
	}
}

// watchDatabase asks a replica that is alive for its database.
func (p *pool) watchDatabase(ctx context.Context, r *replica) {
	for {
		wait := databaseRetry
		if p.isAlive(r) {
			err := p.ask(ctx, r, databaseTimeout, askDatabase)
			if ctx.Err() != nil {
				return
			}
			p.setDatabase(r, err)
			if err == nil {
				wait = databaseInterval
			}
		}
		if !sleep(ctx, wait, r.came) {
			return
		}
	}
}

// sleep waits, less when woken, and reports false when ctx is over.
func sleep(ctx context.Context, d time.Duration, woken <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-woken:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// wake ends a sleep, now or the next time.
func wake(sleeper chan<- struct{}) {
	select {
	case sleeper <- struct{}{}:
	default: // it is being woken already
	}
}

type question func(ctx context.Context, addr string, trust *tls.Config) error

func (p *pool) ask(ctx context.Context, r *replica, limit time.Duration, q question) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	trust, err := trust(p.root, p.serverName)
	if err != nil {
		return err
	}
	return q(ctx, p.address(r), trust)
}

func (p *pool) address(r *replica) string { return net.JoinHostPort(r.addr.String(), p.port) }

func (p *pool) isAlive(r *replica) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return r.alive
}

// setHealth records an answer, or a failed attempt to connect for a client.
func (p *pool) setHealth(r *replica, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := r.state()
	if !r.alive && err == nil {
		wake(r.came)
	}
	r.alive, r.healthErr = err == nil, err
	if err != nil {
		// What it knew of its database was before whatever happened to it.
		r.database, r.databaseErr = false, errNotChecked
	}
	p.logChange(r, was)
}

func (p *pool) setDatabase(r *replica, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := r.state()
	r.database, r.databaseErr = err == nil, nil
	if err != nil {
		r.databaseErr = fmt.Errorf("database: %w", err)
	}
	p.logChange(r, was)
}

// logChange tells of a replica that is no longer what it was.
func (p *pool) logChange(r *replica, was string) {
	is := r.state()
	if is == was {
		return
	}
	fields := []zap.Field{
		zap.String("upstream", p.name()),
		zap.String("address", r.addr.String()),
		zap.String("state", is),
	}
	if err := r.err(); err != nil {
		p.log.Warn("replica", append(fields, zap.Error(err))...)
		return
	}
	p.log.Info("replica", fields...)
}

// state is the replica's own, without regard to drains.
func (r *replica) state() string {
	switch {
	case !r.alive:
		return out
	case !r.database:
		return alive
	default:
		return ready
	}
}

// err is what keeps the replica from being ready.
func (r *replica) err() error {
	if r.healthErr != nil {
		return r.healthErr
	}
	return r.databaseErr
}

// best returns those that may get a connection: the ready ones, or else those that
// at least serve, so that the roots can still be fetched in a database outage.
func (p *pool) best() []*replica {
	now := time.Now()
	for _, want := range []string{ready, alive} {
		var found []*replica
		for addr, r := range p.replicas {
			if r.state() == want && now.After(p.drains[addr]) {
				found = append(found, r)
			}
		}
		if found != nil {
			return found
		}
	}
	return nil
}

// pick chooses the least busy replica besides one and counts a connection to it;
// release takes that back. Without any it returns nil and has DNS asked again.
func (p *pool) pick(besides *replica) *replica {
	p.mu.Lock()
	defer p.mu.Unlock()
	candidates := slices.DeleteFunc(p.best(), func(r *replica) bool { return r == besides })
	if len(candidates) == 0 {
		wake(p.wanted)
		return nil
	}
	// By address, so that the turn goes round.
	slices.SortFunc(candidates, func(a, b *replica) int { return a.addr.Compare(b.addr) })
	p.turn++
	var chosen *replica
	for i := range candidates {
		r := candidates[(p.turn+i)%len(candidates)]
		if chosen == nil || r.active < chosen.active {
			chosen = r
		}
	}
	chosen.active++
	return chosen
}

func (p *pool) release(r *replica) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.active--
}

// ourOwn reports whether a failure to connect is a lack of something on this side.
func ourOwn(err error) bool {
	for _, lack := range []error{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, lack) {
			return true
		}
	}
	return false
}

// Status is what is known of a replica.
type Status struct {
	Upstream string `json:"upstream"`
	Address  string `json:"address"`
	State    string `json:"state"`
	Active   int    `json:"active"`
	Error    string `json:"error,omitempty"`
}

// statuses returns the replicas in order, and whether the name has ever resolved.
func (p *pool) statuses() (list []Status, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	addrs := make([]netip.Addr, 0, len(p.replicas))
	for addr := range p.replicas {
		addrs = append(addrs, addr)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	for _, addr := range addrs {
		r := p.replicas[addr]
		s := Status{Upstream: p.name(), Address: addr.String(), State: r.state(), Active: r.active}
		if now.Before(p.drains[addr]) {
			s.State = draining
		}
		if err := r.err(); err != nil {
			s.Error = err.Error()
		}
		list = append(list, s)
	}
	return list, p.known
}

var (
	errNotChecked = errors.New("not checked yet")
	errUnknown    = errors.New("no such replica")
	errOnlyOne    = errors.New("it is the only one in service")
)

// drain gives a replica no new connection until the time is over.
func (p *pool) drain(addr netip.Addr, until time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, known := p.replicas[addr]
	if !known {
		return errUnknown
	}
	before := p.best()
	was, drained := p.drains[addr]
	p.drains[addr] = until
	after := p.best()
	// Neither the last one, nor the last one with a database.
	if slices.Contains(before, r) && (after == nil || after[0].state() != before[0].state()) {
		delete(p.drains, addr)
		if drained {
			p.drains[addr] = was
		}
		return errOnlyOne
	}
	p.log.Info("drain", zap.String("upstream", p.name()), zap.String("address", addr.String()), zap.Time("until", until))
	return nil
}

// undrain forgets the drain of an address, whether it is in DNS or not. The replica
// may have been restarted meanwhile: what it was before no longer counts.
func (p *pool) undrain(addr netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, drained := p.drains[addr]; !drained {
		return
	}
	delete(p.drains, addr)
	p.log.Info("undrain", zap.String("upstream", p.name()), zap.String("address", addr.String()))
	if r, known := p.replicas[addr]; known {
		r.alive, r.database, r.healthErr = false, false, errNotChecked
		wake(r.again)
	}
}
