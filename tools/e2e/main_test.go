package e2e_test

import (
	"testing"

	"github.com/infra-pki/infra-pki/tools/e2e/internal/stack"
)

func TestMain(m *testing.M) { stack.Main(m) }
