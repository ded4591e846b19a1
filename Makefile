# Millrace. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# What the targets take: RUN=<regexp of test names>, PG=<major version of PostgreSQL>, PKG=<packages>.
RUN ?=
PG ?=
PKG ?= ./...
export PG

# Version of images and of the manager; the tag of the checkout for a release.
VERSION ?= dev

TESTENV = go run ./test/env/cmd/testenv
TOOL = go tool -modfile=tools/dev/go.mod

.PHONY: help
help: ## Show this list.
	@echo "Millrace"; echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2} /^##@ / {printf "\n%s\n", substr($$0, 5)}' $(MAKEFILE_LIST)
	@echo; echo "RUN=<regexp> picks tests, PKG=<packages> picks packages, PG=<15|16|17|18> picks the PostgreSQL of the tests,"
	@echo "CLUSTER=current uses your kubeconfig's current context in e2e and demo, DEMO_SECONDS and DEMO_HOLD=1 shape the demo."

##@ Try it

.PHONY: demo
demo: deps ## From nothing to rows: PostgreSQL, Redis, Kubernetes, Millrace, for a minute.
	@go build -o bin/demo ./test/demo && exec bin/demo

.PHONY: cluster-up
cluster-up: deps ## Start a Kubernetes with one real node; prints its kubeconfig.
	@$(TESTENV) up

.PHONY: cluster-down
cluster-down: ## Stop it and remove what it made.
	@$(TESTENV) down

##@ Test

# The packages that need no node.
UNIT = $(shell go list $(PKG) | grep -v -e /test/e2e -e /test/env/cluster)
GOTEST = KUBEBUILDER_ASSETS="$$($(TESTENV) assets)" go test -timeout 20m $(if $(RUN),-run '$(RUN)')
# Packages without tests, or without one that RUN names, have nothing to say.
QUIET = | sed -u -e '/\[no test files\]$$/d' -e '/\[no tests to run\]$$/d'

# As the tools are built, so that the parts of Argo CD are compiled once.
GITOPS = CGO_ENABLED=0 GOFLAGS=-trimpath go

# Whether RUN or PKG picks something. If not, make test leaves the tests of the rows to make seeds, so that none runs twice.
PICKED = $(RUN)$(filter-out ./...,$(PKG))
REST = $(if $(PICKED),,-skip '^TestSeed_')

.PHONY: test
test: deps assets ## Everything that needs no node, on real PostgreSQL, Redis and Kubernetes API.
	@$(GOTEST) $(REST) $(UNIT) $(QUIET)
	@# On a new machine the operator's benchmark builds a control plane first.
	@$(if $(PICKED),,cd bench && go test -timeout 40m $(REST) ./... $(QUIET))
	@$(if $(PICKED),,cd test/gitops && $(GITOPS) test $(REST) ./... $(QUIET))
	@$(if $(PICKED),,$(MAKE) --no-print-directory seeds)

.PHONY: seeds
seeds: deps assets ## The promises of the seed documents: a table of all rows, each with the tests that show it; RUN=H07: some.
	@KUBEBUILDER_ASSETS="$$($(TESTENV) assets)" go run ./hack/seeds $(if $(RUN),-run '$(RUN)')

.PHONY: test-race
test-race: deps assets ## The same with the race detector.
	@$(GOTEST) -race $(UNIT) $(QUIET)

# How long make soak runs.
SOAK ?= 1h

.PHONY: soak
soak: deps ## The engine's random tests for an hour (SOAK=10m: ten minutes); tells the seed of what fails.
	@MILLRACE_SOAK=$(SOAK) go test -count=1 -timeout 0 -v -run '$(or $(RUN),ModelDoes|ACrash|EveryCommittedMessage)' ./internal/pgstream

.PHONY: soak-pipeline
soak-pipeline: deps ## The processor's faults with servers that stand still or are down for two minutes (SOAK=30m: longer).
	@MILLRACE_SOAK=$(if $(filter 1h,$(SOAK)),2m,$(SOAK)) go test -count=1 -timeout 0 -v -run '$(or $(RUN),Stalls|MemoryIsFlat)' ./internal/pipeline

.PHONY: e2e
e2e: deps ## The end-to-end tests, on real pods; SKIP=<regexp> leaves some out.
	@go test -count=1 -timeout 60m -p 1 -parallel 4 -v $(if $(RUN),-run '$(RUN)') $(if $(SKIP),-skip '$(SKIP)') ./test/env/cluster $(shell go list ./test/e2e/... 2>/dev/null)

# BENCH holds flags of the benchmark: BENCH='-short -work latency-500'.
BENCH ?=

.PHONY: bench
bench: deps ## The engine's benchmarks in their short form; see bench/README.md.
	@./bench/peers.sh pgq
	@cd bench && go run ./cmd/bench -short $(BENCH)

.PHONY: bench-engine
bench-engine: deps ## The engine's benchmarks in full, for an hour; BENCH=<flags>.
	@./bench/peers.sh pgq
	@cd bench && go run ./cmd/bench $(BENCH)

.PHONY: bench-pipeline
bench-pipeline: deps ## Redis streams to a table, beside Redpanda Connect, Bento and Watermill; BENCH=<flags>, BENCH=-short.
	@cd bench && go run ./cmd/bench-pipeline $(BENCH)

.PHONY: bench-operator
bench-operator: deps ## The manager with a thousand Streams on simulated nodes; BENCH=<flags>, BENCH=-short.
	@cd bench && go run ./cmd/bench-operator $(BENCH)

.PHONY: bench-eventstore
bench-eventstore: deps ## Event store and frames, beside Emmett, FlowFabric's statements and a plain table; BENCH=<flags>, BENCH=-short.
	@./bench/peers.sh emmett
	@cd bench && go run ./cmd/bench-eventstore $(BENCH)

##@ Develop

.PHONY: generate
generate: ## Write deep copies, CRDs and RBAC from the Go types and markers, the chart's copies of them, and Argo CD's ConfigMap from the Lua files.
	@$(TOOL) controller-gen object:headerFile=hack/boilerplate.go.txt paths=./api/...
	@$(TOOL) controller-gen crd rbac:roleName=manager paths=./api/... paths=./internal/controller/... output:crd:dir=config/crd/bases output:rbac:dir=config/rbac
	@cp config/crd/bases/*.yaml charts/millrace/files/crds/ && cp config/rbac/role.yaml charts/millrace/files/
	@go run ./hack/argocd-cm config/argocd/resource_customizations >config/argocd/argocd-cm.yaml.new
	@mv config/argocd/argocd-cm.yaml.new config/argocd/argocd-cm.yaml

.PHONY: manifests
manifests: generate ## The same as generate.

DOCTOOL = go tool -modfile=tools/docs/go.mod

.PHONY: docs
docs: ## Write the reference of the API and the README of the chart.
	@$(DOCTOOL) crd-ref-docs --log-level ERROR --config tools/docs/crd-ref-docs.yaml --templates-dir tools/docs/templates \
		--renderer markdown --source-path api/v1alpha1 --output-path docs/reference/api.md
	@$(DOCTOOL) helm-docs --log-level error --chart-search-root charts/millrace --sort-values-order file

.PHONY: lint
lint: ## Run the linters.
	@$(TOOL) golangci-lint run
	@cd bench && go tool -modfile=../tools/dev/go.mod golangci-lint run

.PHONY: fmt
fmt: ## Format the Go code.
	@$(TOOL) golangci-lint fmt

.PHONY: verify
verify: ## What CI checks besides tests: format, vet, lint, generated files.
	@./tools/verify.sh

.PHONY: cli
cli: ## Build the command line program: bin/millrace, and bin/kubectl-millrace for kubectl millrace.
	@CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o bin/millrace ./cmd/millrace
	@ln -sf millrace bin/kubectl-millrace && echo bin/millrace

.PHONY: images
images: ## Build the images as OCI archives in bin/images.
	@$(TESTENV) images $(VERSION)

.PHONY: sbom
sbom: ## Write the bills of materials of both programs, in the format CycloneDX, to bin/sbom.
	@mkdir -p bin/sbom
	@for program in manager processor; do \
		CGO_ENABLED=0 GOOS=linux go build -trimpath -buildvcs=false -ldflags "-s -w -buildid=" -o bin/sbom/$$program ./cmd/$$program; \
		go run ./hack/sbom bin/sbom/$$program >bin/sbom/$$program.cdx.json; \
		rm bin/sbom/$$program; echo bin/sbom/$$program.cdx.json; \
	done

.PHONY: vulncheck
vulncheck: ## Look for known vulnerabilities with govulncheck; fails when its database cannot be reached.
	@./tools/vulncheck.sh

.PHONY: install-yaml
install-yaml: ## Write bin/install.yaml: Millrace without Helm, from config/default; VERSION=<tag of the images>.
	@mkdir -p bin && "$$($(TESTENV) program kubectl)" kustomize config/default >bin/.install.yaml
	@sed 's#\(docker.io/millrace/[a-z]*\):dev#\1:$(VERSION)#' bin/.install.yaml >bin/install.yaml && rm bin/.install.yaml && echo bin/install.yaml

##@ Set up

.PHONY: deps
deps: ## Install what is missing (as root on Debian and Ubuntu), or say what to install.
	@./tools/deps.sh $(if $(PG),postgres-$(PG))

.PHONY: postgres
postgres: ## Install the server of PG=<major> for the tests, if there is none.
	@./tools/postgres.sh $(or $(PG),$(error say which: make postgres PG=18))

.PHONY: assets
assets: ## Build kube-apiserver, etcd and kubectl for the tests (cached).
	@$(TESTENV) assets >/dev/null

.PHONY: tools
tools: ## Build every program of the test cluster (cached).
	@$(TESTENV) tools >/dev/null

.PHONY: clean
clean: cluster-down ## Remove what was built in the source tree. Caches stay.
	@rm -rf bin

.PHONY: clean-cache
clean-cache: ## Remove the cache of built programs and downloaded servers.
	@$(TESTENV) clean-cache
