# Comfort for the operator and the developer; the stack itself needs only
# "docker compose up -d --wait".
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

COMPOSE := docker compose
# step-ca, and crl where step-ca/revocation.yml is on.
CAS = $$($(COMPOSE) ps --services --status running | grep -x -e step-ca -e crl)
TOOLS_IMAGE := infra-pki/tools:local
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

##@ Operate

.PHONY: help
help: ## show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: env check ## start the stack, prove it with a certificate, say what comes next
	@$(COMPOSE) up -d --wait
	@$(MAKE) apply
	@$(COMPOSE) run --rm -T probe --allow-refusal --ca-url "https://127.0.0.1:$$($(COMPOSE) port caddy 9000 | sed 's/.*://')"
	@$(MAKE) summary

.PHONY: env
env: images
	@docker run --rm --network none --user "$$(id -u):$$(id -g)" --volume "$(CURDIR):/checkout" --workdir /checkout \
		$(TOOLS_IMAGE) pkictl env --example .env.example .env

.PHONY: summary
summary:
	@url="https://$$($(COMPOSE) config --format json | sed -n 's/.*"DOMAIN_CA": "\(.*\)",*/\1/p' | head -n 1):$$($(COMPOSE) port caddy 9000 | sed 's/.*://')"; \
	fingerprint=$$($(COMPOSE) exec -T step-ca step certificate fingerprint certs/root_ca.crt); \
	printf '\n  CA URL            %s\n  root fingerprint  %s\n' "$$url" "$$fingerprint"; \
	acme=/acme/acme/directory; \
	if $(COMPOSE) exec -T step-ca curl -fs -o /dev/null --cacert certs/root_ca.crt "https://localhost:9000$$acme"; then \
		printf '  ACME directory    %s\n' "$$url$$acme"; fi; \
	printf '\n  make trust   root, fingerprint and SSH CA keys into ./trust\n  make init    apply an edited .env (allow-list, provisioners, lifetimes)\n  make status  what runs\n'; \
	printf '  on a client: step ca bootstrap --ca-url %s --fingerprint %s\n\n' "$$url" "$$fingerprint"

.PHONY: down
down: ## stop the stack; keys and database stay (never add -v: it destroys the CA)
	@$(COMPOSE) down

.PHONY: init
init: ## apply an edited .env to the running CA and edge, without a restart
	@$(COMPOSE) run --rm --no-deps -T provisioner-init
	@$(MAKE) apply

# What runs takes what is rendered.
.PHONY: apply
apply:
	@began=$$(date +%s); for service in $(CAS); do \
		$(COMPOSE) exec -T $$service reload $$service || case $$? in \
			3) $(COMPOSE) restart $$service && $(COMPOSE) up -d --wait ;; \
			*) $(COMPOSE) logs --no-log-prefix --since "$$began" $$service | grep -m1 '^.*error reloading' >&2; exit 1 ;; esac; done
	@$(COMPOSE) run --rm -T pkictl provisioners
	@said=$$($(COMPOSE) exec -T caddy caddy reload --config /etc/caddy/Caddyfile --adapter caddyfile --address unix//run/edge/admin.sock 2>&1) \
		|| { echo "$$said"; exit 1; } >&2; echo "caddy: follows the allow-list"

.PHONY: check
check: images ## test .env without starting anything
	@unreadable=$$(find caddy/Caddyfile postgres step-ca/*.sh step-ca/templates ! -perm -o=r); test -z "$$unreadable" \
		|| { echo "check: error: containers cannot read: $$unreadable"; echo 'check: hint: chmod -R go+rX caddy postgres step-ca (the checkout was made with a strict umask)'; exit 2; } >&2
	@test -f .env || { echo 'check: error: there is no .env'; echo 'check: hint: "make up" writes one, or copy .env.example'; exit 2; } >&2
	@# The text first: Compose stops at the first secret without a line, and cuts values that it cannot read.
	@said=$$(docker run --rm --network none --user "$$(id -u):$$(id -g)" --volume "$(CURDIR)/.env:/.env:ro" $(TOOLS_IMAGE) config-check --env-file /.env 2>&1) \
		|| { code=$$?; echo "$$said"; exit $$code; } >&2
	@$(COMPOSE) run --rm --no-deps -T config-check

.PHONY: restart
restart: ## restart step-ca and Caddy (connections drain for up to a minute)
	@$(COMPOSE) restart $(CAS) caddy
	@$(COMPOSE) up -d --wait

.PHONY: status
status: ## show the services and their health
	@$(COMPOSE) ps --all --format 'table {{.Service}}\t{{.Status}}\t{{.Ports}}'

.PHONY: trust
trust: ## put the trust anchors into ./trust
	@id=$$($(COMPOSE) ps --all --quiet trust-export); \
	test -n "$$id" || { echo 'trust: error: the stack has not run yet'; echo 'trust: hint: make up'; exit 1; } >&2; \
	mkdir -p trust; docker cp "$$id:/trust/." trust/ >/dev/null; \
	(cd trust && sha256sum --check --quiet SHA256SUMS); ls trust

.PHONY: images
images: ## get every image, or build it where no registry answers
	@tools/airgap/build.sh
	@$(COMPOSE) --env-file .env.example build --quiet

##@ Develop

.PHONY: test
test: lint unit e2e ## everything: lint, unit and integration tests, end to end

.PHONY: unit
unit: prerequisites ## the tests that need no stack
	@go -C tools test -count=1 ./...
	@go -C caddy/edge test -count=1 ./...

.PHONY: e2e
e2e: prerequisites images ## drive the real stack, under project names and ports of its own
	@go -C tools/e2e test -count=1 -timeout 30m -v ./...

.PHONY: lint
lint: prerequisites ## golangci-lint, shellcheck, yamllint
	@for module in tools tools/e2e caddy/edge; do \
		echo "golangci-lint: $$module"; (cd $$module && go run $(GOLANGCI_LINT) run --config $(CURDIR)/.golangci.yml ./...); done
	@git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x
	@git ls-files -z '*.yml' '*.yaml' | xargs -0 yamllint --strict
	@$(COMPOSE) --env-file .env.example config --quiet

.PHONY: prerequisites
prerequisites:
	@tools/e2e/prerequisites.sh

.PHONY: bench
bench: images ## measure start-up, memory and sizes (see BENCHMARKS.md)
	@go -C tools/e2e test -count=1 -timeout 30m -run '^$$' -bench . ./...

.PHONY: vuln
vuln: ## look for known vulnerabilities (needs the network)
	@for module in tools caddy/edge; do (cd $$module && go run $(GOVULNCHECK) ./...); done
