# Comfort for the operator and the developer; the stack itself needs only
# "docker compose up -d --wait".
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

COMPOSE := docker compose
TOOLS_IMAGE := infra-pki/tools:local
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

##@ Operate

.PHONY: help
help: ## show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	printf '\n  make trust   root, fingerprint and SSH CA keys into ./trust\n  make init    apply an edited .env (allow-list, provisioners, lifetimes)\n  make status  what is wrong, and what to do\n'; \
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
	@COMPOSE='$(COMPOSE)' step-ca/roll.sh reload
	@$(COMPOSE) run --rm -T pkictl provisioners
	@said=$$($(COMPOSE) exec -T caddy caddy reload --config /etc/caddy/Caddyfile --adapter caddyfile --address unix//run/edge/admin.sock 2>&1) \
		|| { echo "$$said"; exit 1; } >&2; echo "caddy: follows the allow-list"

.PHONY: check
check: images ## test .env without starting anything
	@unreadable=$$(find caddy/Caddyfile postgres step-ca/*.sh step-ca/templates tools/prometheus ! -perm -o=r); test -z "$$unreadable" \
		|| { echo "check: error: containers cannot read: $$unreadable"; echo 'check: hint: chmod -R go+rX caddy postgres step-ca tools/prometheus (the checkout was made with a strict umask)'; exit 2; } >&2
	@test -f .env || { echo 'check: error: there is no .env'; echo 'check: hint: "make up" writes one, or copy .env.example'; exit 2; } >&2
	@# The text first: Compose stops at the first secret without a line, and cuts values that it cannot read.
	@said=$$(docker run --rm --network none --user "$$(id -u):$$(id -g)" --volume "$(CURDIR)/.env:/.env:ro" $(TOOLS_IMAGE) config-check --env-file /.env 2>&1) \
		|| { code=$$?; echo "$$said"; exit $$code; } >&2
	@$(COMPOSE) run --rm --no-deps -T config-check

.PHONY: restart
restart: ## restart every step-ca, one at a time: no request fails
	@COMPOSE='$(COMPOSE)' step-ca/roll.sh restart

.PHONY: status
status: ## tell on one screen what is wrong and what to do (JSON=1: for machines)
	@services=$$($(COMPOSE) ps --all --format json); \
	test -n "$$services" || { echo 'status: error: the stack has not run yet'; echo 'status: hint: make up'; exit 1; } >&2; \
	! test -t 2 || echo 'asking …' >&2; \
	{ sed 's/^/service /' <<<"$$services"; \
	$(COMPOSE) exec -T caddy caddy upstreams --json </dev/null 2>/dev/null | sed 's/^/upstreams /' || true; \
	COMPOSE='$(COMPOSE)' caddy/seen.sh | sed 's/^/arrival /'; \
	code=0; said=$$($(COMPOSE) run --rm --no-deps -T provisioner-init --check 2>&1 </dev/null) || code=$$?; \
	sed 's/^/drift /' <<<"$$said"; echo "check $$code"; \
	} | $(COMPOSE) run --rm --no-deps -T status $(if $(JSON),--json)

.PHONY: alerts
alerts: ## which alerts fire (with COMPOSE_PROFILES=metrics)
	@$(COMPOSE) exec -T prometheus promtool query instant http://localhost:9090 'ALERTS{alertstate="firing"}'

.PHONY: trust
trust: ## put the trust anchors into ./trust
	@id=$$($(COMPOSE) ps --all --quiet trust-export); \
	test -n "$$id" || { echo 'trust: error: the stack has not run yet'; echo 'trust: hint: make up'; exit 1; } >&2; \
	mkdir -p trust; docker cp "$$id:/trust/." trust/ >/dev/null; \
	(cd trust && sha256sum --check --quiet SHA256SUMS); ls trust

.PHONY: pkictl
pkictl: images ## get the program for hosts into ./pkictl
	@id=$$(docker create $(TOOLS_IMAGE) pkictl); trap 'docker rm "$$id" >/dev/null' EXIT; \
	docker cp "$$id:/usr/local/bin/pkictl" pkictl >/dev/null
	@echo 'Bring it to a host:  scp pkictl root@web.lan:/usr/local/bin/'
	@echo 'and have that join:  docker compose run --rm -T pkictl token --name web.lan'

BACKUP_DIR ?= backups
ENV_FILE ?= .env
AS_OPERATOR = docker run --rm --interactive --network none --user "$$(id -u):$$(id -g)"
# What opens the archive, and then the archive: neither gets into the stack as a file.
OPENED = { cat "$(IDENTITY)"; echo; cat "$(ARCHIVE)"; }
# With JOURNAL=DIR, what was committed after the backup, too.
JOURNAL_MOUNT = $(if $(JOURNAL),--volume "$(abspath $(JOURNAL)):/journal:ro")
JOURNAL_FLAG = $(if $(JOURNAL),--journal /journal)
ARCHIVE_GIVEN = test -f "$(ARCHIVE)" && test -f "$(IDENTITY)" && test -d "$(or $(JOURNAL),.)" \
	|| { echo '$@: error: ARCHIVE and IDENTITY must name files, and JOURNAL a directory if there is one'; echo '$@: hint: make $@ ARCHIVE=backups/infra-pki-20260131T030000Z.age IDENTITY=backup-identity.txt'; exit 2; } >&2

.PHONY: backup-key
backup-key: images ## make the key that opens backups, into ./backup-identity.txt
	@$(AS_OPERATOR) --volume "$(CURDIR):/here" --workdir /here $(TOOLS_IMAGE) pkictl backup keygen backup-identity.txt
	@echo 'Set BACKUP_RECIPIENTS in .env to that line, and take backup-identity.txt to where this machine'"'"'s loss does not reach it.'

.PHONY: backup
backup: ## write the whole CA into an encrypted archive in ./backups (BACKUP_DIR=…)
	@mkdir -p -m 700 "$(BACKUP_DIR)"; dir=$$(cd "$(BACKUP_DIR)" && pwd); \
	receipt=$$($(COMPOSE) run --rm --no-deps -T backup create < "$(ENV_FILE)" \
		| $(AS_OPERATOR) --volume "$$dir:$$dir" $(TOOLS_IMAGE) pkictl backup store --out "$$dir"); \
	echo "$$receipt" | $(COMPOSE) run --rm --no-deps -T backup record

.PHONY: verify
verify: ## test ARCHIVE=… with IDENTITY=… (and JOURNAL=…), without restoring it
	@$(ARCHIVE_GIVEN)
	@$(OPENED) | $(AS_OPERATOR) $(JOURNAL_MOUNT) $(TOOLS_IMAGE) pkictl backup verify $(JOURNAL_FLAG) --identity - -

.PHONY: restore
restore: images ## bring ARCHIVE=… (and JOURNAL=…) into an empty stack, with IDENTITY=…, and start it
	@$(ARCHIVE_GIVEN)
	@$(OPENED) | $(AS_OPERATOR) --volume "$(CURDIR):/checkout" $(TOOLS_IMAGE) pkictl backup files --identity - --into /checkout -
	@$(MAKE) load
	@$(MAKE) up

# The database and the volumes alone.
.PHONY: load
load:
	@$(OPENED) | $(COMPOSE) run --rm -T $(JOURNAL_MOUNT) restore $(RESTORE) $(JOURNAL_FLAG) --identity - -

# The scratch project of a drill: its own port, and a network of its own (the first 24 bits).
DRILL_PORT ?= 19000
DRILL_NET ?= 172.28.199

.PHONY: drill
drill: ## prove that ARCHIVE=… restores, with IDENTITY=…: a second CA beside this one, for a minute
	@$(ARCHIVE_GIVEN)
	@dir=$$(mktemp -d); scratch="docker compose -p infra-pki-drill -f docker-compose.yml --env-file $$dir/.env"; \
	trap '$$scratch down -v >/dev/null 2>&1 || true; rm -rf "$$dir"' EXIT; \
	export CA_PORT=$(DRILL_PORT) EDGE_SUBNET=$(DRILL_NET).0/24 ALLOWED_IPS=$(DRILL_NET).1 COMPOSE_PROFILES= STEP_CA_REPLICAS=1 \
		PROVISIONERS_DIR="$$dir/step-ca/provisioners.d" TEMPLATES_DIR="$$dir/step-ca/templates" IMPORT_DIR="$$dir/import"; \
	mkdir -p "$$PROVISIONERS_DIR" "$$TEMPLATES_DIR" "$$IMPORT_DIR"; \
	$(OPENED) | $(AS_OPERATOR) --volume "$$dir:/checkout" $(TOOLS_IMAGE) pkictl backup files --identity - --into /checkout -; \
	$$scratch down -v; \
	$(OPENED) | $$scratch run --rm -T $(JOURNAL_MOUNT) restore $(JOURNAL_FLAG) --identity - -; \
	$$scratch up -d --wait; \
	$$scratch run --rm --no-deps -T db-wait; \
	$$scratch run --rm -T probe --ca-url "https://127.0.0.1:$(DRILL_PORT)"; \
	echo 'drill: good: the backup restores, its CA issues and renews, and one-time tokens are guarded'

.PHONY: images
images: ## get every image, or build it where no registry answers
	@tools/airgap/build.sh
	@$(COMPOSE) --env-file .env.example build --quiet

##@ Develop

.PHONY: test
test: lint unit fuzz e2e ## everything: lint, unit and integration tests, fuzzing for a while, end to end

.PHONY: unit
unit: prerequisites ## the tests that need no stack
	@go -C tools test -count=1 ./...
	@go -C caddy/edge test -count=1 ./...

.PHONY: fuzz
fuzz: prerequisites ## fuzz each parser of outside input for FUZZTIME (3s)
	@for module in tools caddy/edge; do (cd $$module; grep -rE '^func Fuzz' --include='*_test.go' . | while IFS=: read -r file func; do \
		name=$${func#func }; said=$$(go test -run '^$$' -fuzz "^$${name%%(*}\$$" -fuzztime $${FUZZTIME:-3s} ./$$(dirname $$file) </dev/null 2>&1) \
			|| { echo "$$said"; exit 1; }; tail -n 1 <<<"$$said"; done); done

.PHONY: e2e
e2e: prerequisites images ## drive the real stack, under project names and ports of its own
	@go -C tools/e2e test -count=1 ./internal/...
	@go -C tools/e2e test -count=1 -timeout 60m -v .

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
bench: prerequisites images ## rates against stock wirings, haproxy and nginx; start-up, memory, sizes (see BENCHMARKS.md)
	@go -C tools/e2e test -count=1 -timeout 60m -run '^$$' -bench . .

.PHONY: faults
faults: prerequisites images ## everything that can happen, under load: a table of what clients saw
	@FAULTS=1 go -C tools/e2e test -count=1 -timeout 60m -run '^TestFaults$$' -v .

.PHONY: vuln
vuln: ## look for known vulnerabilities (needs the network)
	@for module in tools caddy/edge; do (cd $$module && go run $(GOVULNCHECK) ./...); done
