package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/infra-pki/infra-pki/tools/internal/postgrestest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"db-wait": main}) }

func TestScripts(t *testing.T) { testscript.Run(t, postgrestest.Scripts("testdata/script")) }
