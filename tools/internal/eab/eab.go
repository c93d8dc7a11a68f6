// Package eab keeps the keys for External Account Binding (RFC 8555 section 7.3.4):
// whoever registers an ACME account proves with one of them that somebody admitted
// it.
//
// step-ca enforces the binding but leaves the management of keys to its makers'
// paid products, so this package writes step-ca's own rows. They must be
// step-ca's to the byte: it reads a row, encodes what it read again, and updates
// only where the database still holds those bytes (smallstep/certificates v0.30.2,
// acme/db/nosql/eab.go and nosql.go). A test holds the two against each other.
package eab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"go.step.sm/crypto/randutil"
)

// State is what can still be done with a key.
type State string

// A key is used once, if at all.
const (
	Unused      State = "unused"      // an account may be registered with it
	Bound       State = "bound"       // an account was
	Deactivated State = "deactivated" // an account was, which is deactivated
	Revoked     State = "revoked"     // no account was, and none will be
)

// Key is one key, without its secret.
type Key struct {
	ID        string
	Reference string
	State     State
	CreatedAt time.Time
	Account   string    // that it is bound to
	EndedAt   time.Time // when it was bound or revoked
}

// Reasons for which nothing was changed.
var (
	ErrUnknown = errors.New("there is no such key")
	ErrBound   = errors.New("it is bound to an account, which it no longer controls")
	ErrTaken   = errors.New("an unused key has this reference")
)

// key is step-ca's row, its fields in step-ca's order.
type key struct {
	ID            string    `json:"id"`
	ProvisionerID string    `json:"provisionerID"` // empty where ca.json declares the provisioners
	Reference     string    `json:"reference"`
	AccountID     string    `json:"accountID,omitempty"`
	HMACKey       []byte    `json:"key"`
	CreatedAt     time.Time `json:"createdAt"`
	BoundAt       time.Time `json:"boundAt"`
}

// reference is a row of step-ca's index by reference.
type reference struct {
	Reference string `json:"reference"`
	KeyID     string `json:"externalAccountKeyID"`
}

// account is step-ca's row of an ACME account. Its key is a JWK, kept as it is.
type account struct {
	ID              string          `json:"id"`
	Key             json.RawMessage `json:"key"`
	Contact         []string        `json:"contact,omitempty"`
	Status          string          `json:"status"`
	LocationPrefix  string          `json:"locationPrefix"`
	ProvisionerID   string          `json:"provisionerID,omitempty"`
	ProvisionerName string          `json:"provisionerName"`
	CreatedAt       time.Time       `json:"createdAt"`
	DeactivatedAt   time.Time       `json:"deactivatedAt"`
}

// Statuses of RFC 8555 section 7.1.6.
const (
	statusValid       = "valid"
	statusDeactivated = "deactivated"
)

const (
	idLength   = 32 // letters and digits, as step-ca's own
	hmacLength = 32 // no shorter than the output of HS256 (RFC 7518 section 3.2)
	// The key of step-ca's index is "." and the reference, and a key has 255 bytes at most.
	maxReference = 254
)

// CheckReference refuses a reference that cannot be stored or shown.
func CheckReference(s string) error {
	switch {
	case len(s) > maxReference:
		return fmt.Errorf("it is longer than %d bytes", maxReference)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return errors.New("it has a character that cannot be printed")
	case strings.TrimSpace(s) != s:
		return errors.New("it has white space around it")
	}
	return nil
}

// DB is a connection, or a transaction that its owner may roll back.
type DB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// Add makes a key and returns its secret, which exists nowhere else but in the
// database. Of several keys with the same reference at most one is unused, and the
// index names the newest.
func Add(ctx context.Context, conn DB, ref string, now time.Time) (id string, secret []byte, err error) {
	if err := CheckReference(ref); err != nil {
		return "", nil, fmt.Errorf("reference %q: %w", ref, err)
	}
	id, err = randutil.Alphanumeric(idLength)
	if err != nil {
		return "", nil, fmt.Errorf("making a key: %w", err)
	}
	row := key{ID: id, Reference: ref, HMACKey: newSecret(), CreatedAt: seconds(now)}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		// The first statement locks the index, so that two at once do not lose a key
		// from it or both find the reference free.
		var listed []byte
		if err := tx.QueryRow(ctx, `insert into public."acme_external_account_keyID_provisionerID_index" as i
			values ('', 'null') on conflict (nkey) do update set nvalue = coalesce(i.nvalue, excluded.nvalue)
			returning nvalue`).Scan(&listed); err != nil {
			return err
		}
		var ids []string
		if err := json.Unmarshal(listed, &ids); err != nil {
			return fmt.Errorf("the index of keys: %w", err)
		}
		if ref != "" {
			if err := refer(ctx, tx, ref, id); err != nil {
				return err
			}
		}
		if err := update(ctx, tx, "acme_external_account_keyID_provisionerID_index", "", append(ids, id)); err != nil {
			return err
		}
		data, err := json.Marshal(row)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `insert into public.acme_external_account_keys (nkey, nvalue) values ($1, $2)`, []byte(id), data)
		return err
	})
	if err != nil {
		return "", nil, fmt.Errorf("adding a key: %w", err)
	}
	return id, row.HMACKey, nil
}

// refer makes the index by reference name the key id, unless it names an unused one.
func refer(ctx context.Context, tx pgx.Tx, ref, id string) error {
	const table = "acme_external_account_keyID_reference_index"
	nkey := []byte("." + ref)
	var data []byte
	err := tx.QueryRow(ctx, `select k.nvalue from public."`+table+`" r
		join public.acme_external_account_keys k on k.nkey = convert_to(convert_from(r.nvalue, 'UTF8')::json ->> 'externalAccountKeyID', 'UTF8')
		where r.nkey = $1`, nkey).Scan(&data)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	if err == nil {
		var other key
		if err := json.Unmarshal(data, &other); err != nil {
			return fmt.Errorf("the key that reference %q names: %w", ref, err)
		}
		if other.state("") == Unused {
			return fmt.Errorf("%w: %s", ErrTaken, other.ID)
		}
	}
	value, err := json.Marshal(reference{Reference: ref, KeyID: id})
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `insert into public."`+table+`" values ($1, $2)
		on conflict (nkey) do update set nvalue = excluded.nvalue`, nkey, value)
	return err
}

// List returns all keys, the oldest first.
func List(ctx context.Context, conn *pgx.Conn) ([]Key, error) {
	keys, err := list(ctx, conn)
	if err != nil {
		return nil, fmt.Errorf("reading the keys: %w", err)
	}
	return keys, nil
}

func list(ctx context.Context, conn *pgx.Conn) ([]Key, error) {
	rows, err := conn.Query(ctx, `select k.nvalue, a.nvalue from public.acme_external_account_keys k
		left join public.acme_accounts a on a.nkey = convert_to(convert_from(k.nvalue, 'UTF8')::json ->> 'accountID', 'UTF8')`)
	if err != nil {
		return nil, err
	}
	keys, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (Key, error) {
		var data, owner []byte
		if err := r.Scan(&data, &owner); err != nil {
			return Key{}, err
		}
		var k key
		if err := json.Unmarshal(data, &k); err != nil {
			return Key{}, err
		}
		var a account
		if owner != nil {
			if err := json.Unmarshal(owner, &a); err != nil {
				return Key{}, err
			}
		}
		return k.public(a.Status), nil
	})
	slices.SortFunc(keys, func(a, b Key) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return keys, err
}

// Revoke makes an unused key unusable: it is marked as spent and its secret is
// replaced by one that nobody knows. The row stays, since step-ca answers a key that
// it does not find with an internal error. It returns the key and whether anything
// was changed.
//
// A bound key controls nothing any more. With deactivate its account is deactivated,
// as its owner could do (RFC 8555 section 7.3.6): step-ca refuses whatever is
// signed with the account's key from then on. Without, ErrBound.
//
// step-ca reads a key, registers the account and then marks the key. A registration
// that has read the key already fails then, and its account orders nothing
// (postgres/migrations/010_eab_once.sql).
func Revoke(ctx context.Context, conn DB, id string, deactivate bool, now time.Time) (Key, bool, error) {
	var (
		result  Key
		changed bool
	)
	err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		var k key
		if err := read(ctx, tx, "acme_external_account_keys", id, &k); err != nil {
			return err
		}
		switch k.state("") {
		case Unused:
			k.HMACKey, k.BoundAt, changed = newSecret(), seconds(now), true
			result = k.public("")
			return update(ctx, tx, "acme_external_account_keys", id, k)
		case Revoked:
			result = k.public("")
			return nil
		}
		var a account
		if err := read(ctx, tx, "acme_accounts", k.AccountID, &a); err != nil {
			return fmt.Errorf("account %q: %w", k.AccountID, err)
		}
		result = k.public(a.Status)
		switch {
		case a.Status == statusDeactivated:
			return nil
		case !deactivate:
			return ErrBound
		case a.Status != statusValid:
			return fmt.Errorf("account %q: its status is %q", a.ID, a.Status)
		}
		a.Status, a.DeactivatedAt, changed = statusDeactivated, seconds(now), true
		result = k.public(a.Status)
		return update(ctx, tx, "acme_accounts", a.ID, a)
	})
	if err != nil {
		return result, false, fmt.Errorf("revoking key %q: %w", id, err)
	}
	return result, changed, nil
}

func (k *key) state(accountStatus string) State {
	switch {
	case k.BoundAt.IsZero():
		return Unused
	case k.AccountID == "":
		return Revoked
	case accountStatus == statusDeactivated:
		return Deactivated
	}
	return Bound
}

func (k *key) public(accountStatus string) Key {
	return Key{
		ID: k.ID, Reference: k.Reference, State: k.state(accountStatus),
		CreatedAt: k.CreatedAt, Account: k.AccountID, EndedAt: k.BoundAt,
	}
}

// read locks a row and decodes it, if it is one that step-ca would write: anything
// else would not survive being written again.
func read(ctx context.Context, tx pgx.Tx, table, nkey string, into any) error {
	var data []byte
	err := tx.QueryRow(ctx, `select nvalue from public."`+table+`" where nkey = $1 for update`, []byte(nkey)).Scan(&data)
	if errors.Is(err, pgx.ErrNoRows) {
		return ErrUnknown
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return err
	}
	again, err := json.Marshal(into)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, data) {
		return fmt.Errorf("its row in %s is not one that step-ca v0.30.2 writes", table)
	}
	return nil
}

func update(ctx context.Context, tx pgx.Tx, table, nkey string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `update public."`+table+`" set nvalue = $2 where nkey = $1`, []byte(nkey), data)
	return err
}

// newSecret makes a secret that does not begin with "-" in base64url: clients take it
// as an argument, and some would take it for a flag.
func newSecret() []byte {
	secret := make([]byte, hmacLength)
	for {
		_, _ = rand.Read(secret) // never fails: it ends the program instead (Go 1.24)
		if Encode(secret)[0] != '-' {
			return secret
		}
	}
}

// Encode is the form in which ACME clients take a secret: base64url without padding.
func Encode(secret []byte) string { return base64.RawURLEncoding.EncodeToString(secret) }

// seconds is the time as step-ca writes it.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
