# Everything works from a fresh clone; `make help` lists the targets.
SHELL       := /bin/bash
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null)
LDFLAGS     := -s -w -X main.version=$(VERSION)
# gRPC's pages about its calls, which nothing here serves, cost 0.6 MiB of every start.
TAGS        := -tags grpcnotrace
CACHE       := $(CURDIR)/.cache
GOTOOLS     := $(CACHE)/tools
export KMSCTL_CACHE ?= $(CACHE)

.PHONY: build test sanitize cross lint fuzz e2e golden cover snapshot clean help demo demo-stop cluster cluster-stop lock deps bench

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps: ## install the Debian packages that building and testing need
	@scripts/deps.sh

build: deps ## bin/kmsctl and bin/kms-server (static), and bin/kms-connector (cgo)
	CGO_ENABLED=0 go build -trimpath $(TAGS) -ldflags '$(LDFLAGS)' -o bin/kmsctl ./cmd/kmsctl
	CGO_ENABLED=0 go build -trimpath $(TAGS) -ldflags '$(LDFLAGS)' -o bin/kms-server ./cmd/kms-server
	CGO_ENABLED=1 go build -trimpath $(TAGS) -ldflags '$(LDFLAGS)' -o bin/kms-connector ./cmd/kms-connector

test: build ## all tests but e2e, with the race detector
	go test -race -shuffle=on -timeout 30m ./...

sanitize: deps ## the C code's tests under AddressSanitizer and UBSan
	@scripts/sanitize.sh

cross: deps ## kms-connector for arm64, ppc64le and s390x, each started under qemu-user
	@scripts/cross.sh

lint: deps ## golangci-lint and goreleaser's own check
	@scripts/lint.sh $(GOTOOLS)

fuzz: ## every fuzz target for FUZZTIME each
	@scripts/fuzz.sh $(or $(FUZZTIME),30s)

golden: build ## rewrite golden files and scripts' expectations
	KMSCTL_UPDATE=1 go test ./... -count=1

cover: build ## coverage by package
	go test -cover ./...

bench: build ## Go benchmarks and the comparisons with peers
	@scripts/bench-start.sh
	@scripts/bench-kms.sh
	go test -run '^$$' -bench . -benchtime 1s ./...

lock: ## renew the lock file of the images' Debian packages
	@scripts/lock.sh

demo: build ## the main job from nothing; CLUSTER=local uses a real cluster here
	@CLUSTER=$(CLUSTER) scripts/demo.sh

demo-stop: ## stop what the demo left running
	@scripts/demo-stop.sh

cluster: ## a real one-node Kubernetes cluster on this machine
	@scripts/cluster/cluster.sh up

cluster-stop: ## take it down
	@scripts/cluster/cluster.sh down

e2e: build ## the tests on the real cluster
	@scripts/e2e.sh

snapshot: ## what a release would hold, into dist/
	@scripts/lint.sh $(GOTOOLS) goreleaser release --snapshot --clean

clean: demo-stop cluster-stop ## remove what was built here, caches included
	@scripts/e2e.sh --stop
	rm -rf bin dist .cache
