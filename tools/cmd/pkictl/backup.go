package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"filippo.io/age"

	"github.com/infra-pki/infra-pki/tools/internal/backup"
	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/postgres"
)

const ownerEnvironment = `Environment, as in the stack's service backup:
  POSTGRES_HOST, POSTGRES_PORT, POSTGRES_SSLMODE, POSTGRES_DB, POSTGRES_USER
  POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE
`

// ownerLockTimeout is how long a statement waits for a table that is being altered.
const ownerLockTimeout = time.Minute

var backupCreate = command{
	summary: "write everything that the CA consists of into one encrypted archive",
	usage: `usage: pkictl backup create [flags] < .env

Writes the database, keys, certificates, configuration, .env and the operator's own
files as they are at one moment, encrypted to BACKUP_RECIPIENTS. The archive is verified
while it is written. Without --out it goes to standard output, packed for the way to
"pkictl backup store"; "make backup" joins the two and has the result recorded.

  --out DIR           store it in DIR under a name with its time, and record it in the database
  --env FILE          the .env of the stack (default -, standard input)
  --home DIR          step-ca's home: config/, certs/, secrets/, trusted-roots/ (default /home/step)
  --root-ca DIR       where the root key lies (default /root-ca)
  --provisioners DIR  further provisioners (default /provisioners.d)
  --templates DIR     certificate templates (default /templates)

` + ownerEnvironment + `  BACKUP_RECIPIENTS: public keys of age, or lines of ssh-ed25519, separated by commas

Examples:
  make backup
  docker compose run --rm -T backup create < .env | pkictl backup store --out ./backups
`,
	setup: func(fs *flag.FlagSet) work {
		out := fs.String("out", "", "")
		env := fs.String("env", "-", "")
		parts := partFlags(fs)
		return func(ctx context.Context, log *slog.Logger) error { return createBackup(ctx, *out, *env, parts(), log) }
	},
}

// partFlags declares where the parts of an archive lie.
func partFlags(fs *flag.FlagSet) func() map[string]string {
	home := fs.String("home", "/home/step", "")
	rootCA := fs.String("root-ca", "/root-ca", "")
	provisioners := fs.String("provisioners", "/provisioners.d", "")
	templates := fs.String("templates", "/templates", "")
	return func() map[string]string {
		parts := map[string]string{backup.RootCA: *rootCA, backup.Provisioners: *provisioners, backup.Templates: *templates}
		for _, part := range []string{backup.Config, backup.Secrets, backup.Certs, backup.TrustedRoots} {
			parts[part] = filepath.Join(*home, part)
		}
		return parts
	}
}

// owner reads how the owner of the database logs in. further settings are checked
// before anything is tried.
func owner(further ...error) (postgres.Login, error) {
	settings := config.NewReader()
	db, password := settings.Database(), settings.OwnerPassword()
	settings.Join(further...)
	if err := settings.Err(); err != nil {
		return postgres.Login{}, err
	}
	return postgres.Owner(db, password, ownerLockTimeout), nil
}

// ownerAndRecipients reads who writes and for whom.
func ownerAndRecipients() (postgres.Login, []age.Recipient, error) {
	recipients, err := backup.ParseRecipients(os.Getenv("BACKUP_RECIPIENTS"))
	var further []error
	if err != nil {
		further = append(further, err)
	} else if len(recipients) == 0 {
		further = append(further, errors.New("BACKUP_RECIPIENTS is missing; a good value: the public key that \"make backup-key\" prints"))
	}
	login, err := owner(further...)
	return login, recipients, err
}

func createBackup(ctx context.Context, out, env string, parts map[string]string, log *slog.Logger) error {
	login, recipients, err := ownerAndRecipients()
	if err != nil {
		return err
	}
	if info, err := os.Stdout.Stat(); out == "" && (err != nil || info.Mode()&os.ModeCharDevice != 0) {
		return oneshot.Usage(errors.New("the archive does not go to a terminal: name a directory with --out, or pass it on to \"pkictl backup store\""))
	}
	settings, err := readEnv(env)
	if err != nil {
		return err
	}
	source := backup.Source{Owner: login, Parts: parts, Env: settings, Recipients: recipients, Now: time.Now()}
	if out == "" {
		return sendBackup(ctx, source, os.Stdout, log)
	}
	reader, writer := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := sendBackup(ctx, source, writer, log)
		_ = writer.CloseWithError(err) // a pipe always closes
		sent <- err
	}()
	receipt, err := backup.Store(reader, out)
	_ = reader.CloseWithError(err) // a pipe always closes
	if failed := <-sent; failed != nil && (err == nil || !errors.Is(failed, err)) {
		return failed
	}
	if err != nil {
		return err
	}
	stored(ctx, receipt, out, log)
	return backup.Record(ctx, login, receipt)
}

// readEnv takes the .env that belongs to the backup and refuses what is none.
func readEnv(path string) ([]byte, error) {
	if path != "-" {
		return dotenv.ReadFile(path)
	}
	data, err := io.ReadAll(io.LimitReader(os.Stdin, dotenv.MaxSize+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading .env: %w", err)
	case len(data) > dotenv.MaxSize:
		return nil, fmt.Errorf("reading .env: it is larger than %d bytes", dotenv.MaxSize)
	case len(data) == 0:
		return nil, oneshot.WithHint(oneshot.WithExitCode(errors.New("reading .env: nothing came over standard input"), oneshot.ExitMisconfigured),
			"without .env the backup would have no password for its keys: pkictl backup create < .env")
	}
	return data, nil
}

func sendBackup(ctx context.Context, source backup.Source, w io.Writer, log *slog.Logger) error {
	sender := backup.NewSender(w)
	m, err := backup.Create(ctx, sender, source)
	if err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "written and verified", slog.String("root", m.Root), slog.Int64("certificates", m.Certificates),
		slog.Int("files", len(m.Files)), slog.Int("tables", len(m.Tables)))
	if err := sender.End(m); err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	return nil
}

func stored(ctx context.Context, r *backup.Receipt, dir string, log *slog.Logger) {
	log.LogAttrs(ctx, slog.LevelInfo, "stored", slog.String("path", filepath.Join(dir, r.Name)), slog.Int64("bytes", r.Bytes),
		slog.Int64("certificates", r.Certificates))
}

var backupStore = command{
	summary: "store an archive that \"backup create\" sends",
	usage: `usage: pkictl backup store [flags] --out DIR

Takes from standard input what "pkictl backup create" writes and stores it in DIR as
infra-pki-TIME.age, readable by its owner alone, whole or not at all. Prints a receipt,
one line of JSON, for "pkictl backup record".

  --out DIR   the directory

Examples:
  docker compose run --rm -T backup create < .env | pkictl backup store --out ./backups
`,
	setup: func(fs *flag.FlagSet) work {
		out := fs.String("out", "", "")
		return func(ctx context.Context, log *slog.Logger) error {
			if *out == "" {
				return oneshot.Usage(errors.New("missing --out"))
			}
			receipt, err := backup.Store(os.Stdin, *out)
			if err != nil {
				return err
			}
			stored(ctx, receipt, *out, log)
			return json.NewEncoder(os.Stdout).Encode(receipt)
		}
	},
}

var backupRecord = command{
	summary: "tell the database that an archive is stored",
	usage: `usage: pkictl backup record < RECEIPT

Takes the receipt of "pkictl backup store" from standard input and records it in the
table infra_pki.backups, which tells how old the last backup is.

` + ownerEnvironment + `
Examples:
  docker compose run --rm -T backup record < receipt.json
`,
	setup: func(*flag.FlagSet) work {
		return func(ctx context.Context, log *slog.Logger) error {
			login, err := owner()
			if err != nil {
				return err
			}
			receipt := &backup.Receipt{}
			if err := json.NewDecoder(io.LimitReader(os.Stdin, 1<<16)).Decode(receipt); err != nil || receipt.Bytes <= 0 || receipt.Taken.IsZero() {
				return oneshot.Usage(errors.New("standard input is not a receipt of \"pkictl backup store\""))
			}
			if err := backup.Record(ctx, login, receipt); err != nil {
				return err
			}
			log.LogAttrs(ctx, slog.LevelInfo, "recorded", slog.String("name", receipt.Name))
			return nil
		}
	},
}

var backupJournal = command{
	summary: "write down what is committed after a backup, as long as it runs",
	usage: `usage: pkictl backup journal [flags] --out DIR
       pkictl backup journal --health

Follows the database through a replication slot and writes what is committed into DIR,
encrypted to BACKUP_RECIPIENTS: a file journal-….age at the latest --interval after the
first change in it, and none when nothing changes. The server keeps what is not on disk
yet. "restore --journal DIR" brings a backup to where the journal ends. It is the service
of postgres/journal.yml, and stays until it is stopped.

  --out DIR          the directory, on another disk than the database
  --interval LENGTH  how old a change may get before it is written, 1s to 1h (default 1m)
  --state FILE       whose time is when the journal was last in step
                     (default /tmp/journal)
  --health           ends with 0 if that is less than half a minute ago, else with 1

` + ownerEnvironment + `  BACKUP_RECIPIENTS: public keys of age, or lines of ssh-ed25519, separated by commas

Examples:
  pkictl backup journal --out /journal
  docker compose exec journal pkictl backup journal --health
`,
	setup: func(fs *flag.FlagSet) work {
		var f backup.Follower
		fs.StringVar(&f.Dir, "out", "", "")
		fs.DurationVar(&f.Interval, "interval", time.Minute, "")
		fs.StringVar(&f.State, "state", "/tmp/journal", "")
		health := fs.Bool("health", false, "")
		return func(ctx context.Context, log *slog.Logger) (err error) {
			switch {
			case *health:
				return backup.Follows(f.State, time.Now())
			case f.Dir == "":
				return oneshot.Usage(errors.New("missing --out"))
			case f.Interval < time.Second || f.Interval > time.Hour:
				return oneshot.Usage(fmt.Errorf("--interval %s is not from 1s to 1h", f.Interval))
			}
			if f.Owner, f.Recipients, err = ownerAndRecipients(); err != nil {
				return err
			}
			f.Log = log
			return f.Run(ctx)
		}
	},
}

var backupKeygen = command{
	summary: "make the key that opens backups",
	usage: `usage: pkictl backup keygen FILE

Writes a new age identity to FILE, readable by its owner alone, and prints its public
half, for BACKUP_RECIPIENTS. FILE is never overwritten. Keep it away from the CA's
machine: it opens every backup, and without it none can be restored.

Examples:
  make backup-key
  pkictl backup keygen backup-identity.txt
`,
	operands: []string{"FILE"},
	setup: func(fs *flag.FlagSet) work {
		return func(context.Context, *slog.Logger) error {
			recipient, err := backup.Keygen(fs.Arg(0))
			if errors.Is(err, os.ErrExist) {
				return oneshot.WithHint(fmt.Errorf("making an identity: %q is there already", fs.Arg(0)), "it may be the only key to your backups: choose another name")
			}
			if err != nil {
				return err
			}
			fmt.Println(recipient)
			return nil
		}
	},
}

const journalFlag = `  --journal DIR     and every segment of the journal that was written after it
`

const archiveFlags = `  --identity FILE   what opens it: the file of "pkictl backup keygen", or an SSH key without
                    a passphrase. "-" is standard input; if ARCHIVE is "-" too, the identity
                    comes first and then, on a new line, the archive
`

var backupVerify = command{
	summary: "test an archive without restoring it",
	usage: `usage: pkictl backup verify --identity FILE [--journal DIR] ARCHIVE

Decrypts the archive, compares everything in it with its digest, and demands that its
parts belong together: root, intermediate, the root that the database knows, and keys
that open with the passwords in its .env. Prints what it holds, and no secret. With
--journal, it demands that the segments in DIR continue the archive without a gap, and
prints up to when.

` + archiveFlags + journalFlag + `
Examples:
  pkictl backup verify --identity backup-identity.txt backups/infra-pki-20260131T030000Z.age
  { cat backup-identity.txt; echo; cat backups/infra-pki-20260131T030000Z.age; } |
    docker run --rm -i --network none infra-pki/tools:local pkictl backup verify --identity - -
`,
	operands: []string{"ARCHIVE"},
	setup: func(fs *flag.FlagSet) work {
		identity := fs.String("identity", "", "")
		journal := fs.String("journal", "", "")
		return func(ctx context.Context, _ *slog.Logger) error {
			identities, r, done, err := openArchive(ctx, *identity, fs.Arg(0))
			if err != nil {
				return err
			}
			defer done()
			c, err := backup.Verify(r, identities)
			if err != nil {
				return err
			}
			var further string
			if *journal != "" {
				j, err := backup.OpenJournal(*journal, identities, c)
				if err != nil {
					return err
				}
				further = fmt.Sprintf("journal       to %s, %d transactions after the backup, %d segments\n", j.Through.Format(time.RFC3339), j.Transactions, j.Segments)
			}
			var rows int64
			for _, t := range c.Tables {
				rows += t.Rows
			}
			fmt.Printf("taken         %s\nroot          %s\ncertificates  %d\nschema        %d\nfiles         %d\ntables        %d with %d rows\n%s",
				c.Taken.Format(time.RFC3339), c.Root, c.Certificates, c.Schema, len(c.Files), len(c.Tables), rows, further)
			return nil
		}
	},
}

// verified reads an archive once, to its end.
func verified(ctx context.Context, identity, archive string) (*backup.Contents, error) {
	identities, r, done, err := openArchive(ctx, identity, archive)
	if err != nil {
		return nil, err
	}
	defer done()
	return backup.Verify(r, identities)
}

var backupFiles = command{
	summary: "take .env and the operator's own files out of an archive",
	usage: `usage: pkictl backup files --identity FILE [--into DIR] ARCHIVE

Verifies the archive and writes .env, step-ca/provisioners.d, step-ca/templates and
step-ca/trusted-roots into DIR. What is there already must be the same: nothing is
overwritten, and nothing is written if one file differs. "make restore" begins with it.

` + archiveFlags + `  --into DIR        the checkout (default: the current directory)
  --dry-run         verify, compare, and say what would be written

Examples:
  pkictl backup files --identity backup-identity.txt --into /srv/infra-pki infra-pki-20260131T030000Z.age
`,
	operands: []string{"ARCHIVE"},
	setup: func(fs *flag.FlagSet) work {
		identity := fs.String("identity", "", "")
		into := fs.String("into", ".", "")
		dryRun := fs.Bool("dry-run", false, "")
		return func(ctx context.Context, log *slog.Logger) error {
			c, err := verified(ctx, *identity, fs.Arg(0))
			if err != nil {
				return err
			}
			if err := c.Unpack(ctx, *into, *dryRun, log); err != nil {
				return err
			}
			values, err := dotenv.Values(c.Env())
			if err != nil {
				return fmt.Errorf("reading .env: %w", err)
			}
			for setting, dir := range map[string]string{"PROVISIONERS_DIR": "step-ca/provisioners.d", "TEMPLATES_DIR": "step-ca/templates"} {
				if value := values[setting]; value != "" && filepath.Clean(value) != dir {
					log.LogAttrs(ctx, slog.LevelWarn, "the stack reads these from elsewhere: move them there",
						slog.String("files", dir), slog.String("setting", setting), slog.String("to", value))
				}
			}
			return nil
		}
	},
}

var restore = command{
	summary: "bring an archive into an empty stack",
	usage: `usage: pkictl restore [flags] --identity FILE ARCHIVE

Verifies the whole archive, then loads the database and writes the volumes with keys,
certificates and configuration. Only into an empty stack: one that has keys, or whose
database knows a root, is left as it is. Killed at any instant it can be run again.
"make restore" takes .env out of the archive first, and starts the stack afterwards.
With --journal, the database becomes what it was when the last segment in DIR ends.

` + archiveFlags + journalFlag + `  --keep-database   restore the volumes alone: keys were lost, and the database that belongs
                    to them was not
  --dry-run         verify the archive, look whether the stack is empty, and say what
                    would be restored
  --migrations DIR  the schema's (default /migrations)
  --home DIR        step-ca's home: config/, certs/, secrets/ (default /home/step)
  --root-ca DIR     where the root key lies (default /root-ca)

` + ownerEnvironment + `
Examples:
  make restore ARCHIVE=infra-pki-20260131T030000Z.age IDENTITY=backup-identity.txt
  make load RESTORE=--dry-run ARCHIVE=infra-pki-20260131T030000Z.age IDENTITY=backup-identity.txt
  make restore ARCHIVE=infra-pki-20260131T030000Z.age IDENTITY=backup-identity.txt JOURNAL=journal
`,
	operands: []string{"ARCHIVE"},
	setup: func(fs *flag.FlagSet) work {
		identity := fs.String("identity", "", "")
		var target backup.Target
		fs.BoolVar(&target.KeepDatabase, "keep-database", false, "")
		fs.BoolVar(&target.DryRun, "dry-run", false, "")
		fs.StringVar(&target.Journal, "journal", "", "")
		fs.StringVar(&target.Migrations, "migrations", "/migrations", "")
		home := fs.String("home", "/home/step", "")
		rootCA := fs.String("root-ca", "/root-ca", "")
		return func(ctx context.Context, log *slog.Logger) error {
			if target.KeepDatabase && target.Journal != "" {
				return oneshot.Usage(errors.New("--keep-database and --journal exclude each other"))
			}
			target.Log, target.Parts = log, map[string]string{backup.RootCA: *rootCA}
			for _, part := range []string{backup.Config, backup.Secrets, backup.Certs} {
				target.Parts[part] = filepath.Join(*home, part)
			}
			return restoreArchive(ctx, *identity, fs.Arg(0), target)
		}
	},
}

func restoreArchive(ctx context.Context, identity, archive string, target backup.Target) error {
	var err error
	if target.Owner, err = owner(); err != nil {
		return err
	}
	identities, r, done, err := openArchive(ctx, identity, archive)
	if err != nil {
		return err
	}
	defer done()
	// It is read twice: verified, and then restored. It stays encrypted meanwhile.
	spool, err := os.CreateTemp("", "restore")
	if err != nil {
		return fmt.Errorf("keeping the archive: %w", err)
	}
	defer spool.Close() //nolint:errcheck // nobody sees it any more
	if err := os.Remove(spool.Name()); err != nil {
		return fmt.Errorf("keeping the archive: %w", err)
	}
	if _, err := io.Copy(spool, r); err != nil {
		return fmt.Errorf("keeping the archive: %w", err)
	}
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("keeping the archive: %w", err)
	}
	c, err := backup.Restore(ctx, interruptible{ctx, spool}, identities, target)
	if err != nil {
		return err
	}
	message := "restored"
	if target.DryRun {
		message = "can be restored"
	}
	target.Log.LogAttrs(ctx, slog.LevelInfo, message, slog.String("root", c.Root), slog.Int64("certificates", c.Certificates), slog.Time("taken", c.Taken))
	return nil
}

// openArchive opens an archive and what opens it; one of them, or both, may be
// standard input.
func openArchive(ctx context.Context, identity, archive string) ([]age.Identity, io.Reader, func(), error) {
	if identity == "" {
		return nil, nil, nil, oneshot.Usage(errors.New("missing --identity"))
	}
	if identity == "-" && archive == "-" {
		identities, r, err := backup.Split(os.Stdin)
		return identities, r, func() {}, err
	}
	text, err := readIdentity(identity)
	if err != nil {
		return nil, nil, nil, err
	}
	identities, err := backup.ParseIdentities(text)
	if err != nil {
		return nil, nil, nil, err
	}
	if archive == "-" {
		return identities, os.Stdin, func() {}, nil
	}
	f, err := os.Open(archive)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("reading the archive: %w", err)
	}
	return identities, interruptible{ctx, f}, func() { _ = f.Close() }, nil // read only
}

func readIdentity(path string) ([]byte, error) {
	from := os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("reading the identity: %w", err)
		}
		defer f.Close() //nolint:errcheck // read only
		from = f
	}
	text, err := io.ReadAll(io.LimitReader(from, 1<<16))
	if err != nil {
		return nil, fmt.Errorf("reading the identity: %w", err)
	}
	return text, nil
}

// interruptible is a file that cannot be read any more when ctx is done.
type interruptible struct {
	ctx context.Context //nolint:containedctx // a reader has nowhere else to take it from
	*os.File
}

func (i interruptible) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, errors.New("interrupted")
	}
	return i.File.Read(p)
}
