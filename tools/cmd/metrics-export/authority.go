package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"go.step.sm/crypto/pemutil"
	"go.step.sm/crypto/x509util"

	"github.com/infra-pki/infra-pki/tools/internal/stepca"
)

const (
	rootFile         = "root_ca.crt"
	intermediateFile = "intermediate_ca.crt"
)

// certificates are the CA's own. Several roots are in one file while they take turns, so
// each is told by its fingerprint.
type certificates struct{ dir string }

var notAfter = desc("certificate_not_after_seconds", "When a certificate of the CA ends, in seconds since 1970.", "name", "fingerprint")

func (c certificates) collect(_ context.Context, add emit) error {
	var problems []error
	for _, kind := range []struct{ name, file string }{{"root", rootFile}, {"intermediate", intermediateFile}} {
		bundle, err := pemutil.ReadCertificateBundle(filepath.Join(c.dir, kind.file))
		if err != nil {
			problems = append(problems, fmt.Errorf("reading the %s certificate: %w", kind.name, err))
			continue
		}
		seen := map[string]bool{}
		for _, cert := range bundle {
			if fingerprint := x509util.Fingerprint(cert); !seen[fingerprint] {
				seen[fingerprint] = true
				add(notAfter, prometheus.GaugeValue, float64(cert.NotAfter.Unix()), kind.name, fingerprint)
			}
		}
	}
	return errors.Join(problems...)
}

// stepCAs are the replicas, each asked by its own address: behind one name any of them
// would answer.
type stepCAs struct {
	url      string
	expected int
	certs    string
}

var (
	replicasExpected = desc("replicas_expected", "Replicas of step-ca that there are to be.")
	replicaUp        = desc("replica_up", "Whether a replica of step-ca told its provisioners.", "replica")
	provisionerReady = desc("provisioner_ready", "Whether a replica of step-ca could initialise a provisioner when it last read its configuration.", "replica", "provisioner")
)

func (s stepCAs) collect(ctx context.Context, add emit) error {
	add(replicasExpected, prometheus.GaugeValue, float64(s.expected))
	roots, err := pemutil.ReadCertificateBundle(filepath.Join(s.certs, rootFile))
	if err != nil {
		return fmt.Errorf("reading the root certificate: %w", err)
	}
	client, err := stepca.New(s.url, roots...)
	if err != nil {
		return err
	}
	replicas, err := client.Replicas(ctx)
	if err != nil {
		return err
	}
	var (
		mu       sync.Mutex
		problems []error
		work     sync.WaitGroup
	)
	for address, replica := range replicas {
		work.Go(func() {
			ready, err := provisioners(ctx, replica)
			add(replicaUp, prometheus.GaugeValue, number(err == nil), address.String())
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				problems = append(problems, fmt.Errorf("replica %s: %w", address, err))
			}
			for name, is := range ready {
				add(provisionerReady, prometheus.GaugeValue, number(is), address.String(), name)
			}
		})
	}
	work.Wait()
	// In one order, so that the same trouble is the same words.
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(problems...)
}

// provisioners tells which are ready. Those of the same name count as one, which is ready
// if all are.
func provisioners(ctx context.Context, replica *stepca.Client) (map[string]bool, error) {
	all, err := replica.Provisioners(ctx)
	if err != nil {
		return nil, err
	}
	ready := map[string]bool{}
	for _, data := range all {
		var p struct {
			Name  string `json:"name"`
			State string `json:"state"` // nothing, if it is ready
		}
		if err := json.Unmarshal(data, &p); err != nil {
			return nil, fmt.Errorf("reading a provisioner: %w", err)
		}
		was, seen := ready[p.Name]
		ready[p.Name] = p.State != "Uninitialized" && (was || !seen)
	}
	return ready, nil
}

// disk is where the stack's volumes are, seen through one of them. Docker keeps them on
// one file system unless somebody arranges otherwise.
type disk struct{ path string }

var (
	diskSize = desc("disk_size_bytes", "Size of the file system that the CA's certificates are on.")
	diskFree = desc("disk_free_bytes", "Room on the file system that the CA's certificates are on.")
)

func (d disk) collect(_ context.Context, add emit) error {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(d.path, &fs); err != nil {
		return fmt.Errorf("measuring the file system of %q: %w", d.path, err)
	}
	add(diskSize, prometheus.GaugeValue, float64(fs.Blocks)*float64(fs.Bsize))
	add(diskFree, prometheus.GaugeValue, float64(fs.Bavail)*float64(fs.Bsize))
	return nil
}
