package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"

	"github.com/infra-pki/infra-pki/tools/internal/backup"
	"github.com/infra-pki/infra-pki/tools/internal/config"
	"github.com/infra-pki/infra-pki/tools/internal/dotenv"
	"github.com/infra-pki/infra-pki/tools/internal/oneshot"
	"github.com/infra-pki/infra-pki/tools/internal/provisioner"
)

const usage = `Usage: config-check [--env-file FILE | --provisioners DIR --templates DIR]

Reads every setting of the stack, the provisioners in files and the certificate
templates, and reports all problems at once. It starts nothing and writes nothing.

  --env-file FILE     read a .env file, as Compose would, in place of the environment,
                      and nothing else
  --provisioners DIR  further provisioners, *.json (default /provisioners.d)
  --templates DIR     certificate templates, *.tpl (default /templates)

Exit codes: 0 all is well (warnings may be printed), 2 misconfigured.

Examples:
  make check
  config-check --env-file .env
`

func run(ctx context.Context, args []string, log *slog.Logger) error {
	flags := flag.NewFlagSet("config-check", flag.ContinueOnError)
	file := flags.String("env-file", "", "")
	dropins := flags.String("provisioners", "/provisioners.d", "")
	templates := flags.String("templates", "/templates", "")
	if err := oneshot.Parse(flags, args, usage); err != nil {
		return err
	}
	if *file != "" {
		if err := load(*file); err != nil {
			return err
		}
	}
	settings := config.NewReader()
	i := settings.Issuance()
	_, _ = settings.Edge(), settings.Database()
	settings.Sizes()
	settings.Journal()
	settings.AllSecrets()
	if _, err := backup.ParseRecipients(os.Getenv("BACKUP_RECIPIENTS")); err != nil {
		settings.Join(err)
	}
	if *file == "" {
		_, problems := provisioner.Read(i, *dropins, *templates)
		settings.Join(problems...)
	}
	for _, w := range settings.Warnings() {
		log.LogAttrs(ctx, slog.LevelWarn, w)
	}
	if err := settings.Err(); err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "all settings are good", slog.Int("warnings", len(settings.Warnings())))
	return nil
}

// load puts the settings of a .env file into the environment of this process.
func load(file string) error {
	values, err := dotenv.Read(file)
	if err != nil {
		return err
	}
	for _, name := range slices.Concat(config.Names(), config.SecretNames()) {
		if err := os.Setenv(name, values[name]); err != nil {
			return oneshot.WithExitCode(fmt.Errorf("%s has a NUL byte in it", name), oneshot.ExitMisconfigured)
		}
	}
	return nil
}
