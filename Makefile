# `make help` lists the targets. PYTHON is the interpreter that .venv is made from: 3.11 to 3.14.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,$(shell $(p) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 14) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
# pip_install,ENVIRONMENT: uv where it is installed, else the environment's own pip; both honour --require-hashes.
# Compiled to bytecode, as pip does by itself: torch and torchvision take nine seconds of processor time to import without, in every process where
# PYTHONDONTWRITEBYTECODE is set.
# TORCH_INDEX: an index of packages with the torch to take, such as one of CPU-only wheels; empty for the lock's own, which brings CUDA.
TORCH_INDEX ?=
pip_install = $(if $(shell command -v uv),uv pip install -q --compile-bytecode --python $(1)/bin/python,$(1)/bin/pip --disable-pip-version-check -q install)
need_python = @test -n "$(PYTHON)" || { echo "convscope needs Python 3.11 to 3.14; set PYTHON=/path/to/python" >&2; exit 1; }
PORT ?= 8080
# Whatever the environment says, Python keeps what it compiles: the processes that tests start import the same modules
# hundreds of times.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo stop serve check test parts thorough prometheus chromium page page-tools kubectl lint style mypy pyright format test-client test-kserve kserve test-gpu test-docker test-kubernetes drill campaign secrets key revoke keys certificate check-config replicas restart update bench bench-full archives proto lock pin clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed .venv-proto/installed ## Set up everything in .venv: service, client, lens, developers' tools; TORCH_INDEX=URL for other wheels of torch

# The stamps are renewed when a lock file changes; --require-hashes holds for every file that is downloaded.
.venv/installed: requirements/dev.txt client/pyproject.toml lens/pyproject.toml
	$(need_python)
	@echo "Setting up .venv with $(PYTHON): about 7 GB, a few minutes the first time"
	$(PYTHON) -m venv .venv
ifeq ($(TORCH_INDEX),)
	$(call pip_install,.venv) --require-hashes --no-deps -r requirements/dev.txt
else
	awk -f requirements/without_torch.awk requirements/dev.txt > .venv/others.txt
	$(call pip_install,.venv) --require-hashes --no-deps -r .venv/others.txt
	$(call pip_install,.venv) --no-deps --index-url "$(TORCH_INDEX)" $(shell sed -nE 's/^(torch(vision)?==[^ ]+).*/\1/p' requirements/dev.txt)
endif
	$(call pip_install,.venv) --no-deps --no-build-isolation -e ./client -e ./lens
	@touch $@

.venv-proto/installed: requirements/proto.txt
	$(need_python)
	$(PYTHON) -m venv .venv-proto
	$(call pip_install,.venv-proto) --require-hashes --no-deps -r requirements/proto.txt
	@touch $@

demo: .venv/installed ## Serve, classify the pictures of samples/, draw their maps, say what next
	$(BIN)/python samples/demo.py

stop: ## Stop the service that `make demo` left running
	@test ! -e out/demo/server.pid || $(BIN)/python samples/demo.py --stop

serve: .venv/installed stop ## Serve every archive of model_store/ until Ctrl-C
	$(BIN)/python -m server --rest-port $(PORT)

# Tests run in parts, a process each, which imports what its rooms need alone. JOBS of them run at a time, those that take longest
# first: three for each core, since tests wait for servers, those of watched, server, client and wire most of the time.
JOBS ?= $(shell expr 3 \* $$(nproc 2>/dev/null || echo 1))
MARKS := not docker and not gpu and not kubernetes
PACKAGED := $(patsubst %,tests/archiver/test_%.py,packages recipes stock_torchserve survey your_own_network)
WATCHED := $(patsubst %,tests/server/test_%.py,life refusals watched)
WIRE := $(patsubst %,tests/client/test_%.py,backend install network retries) $(wildcard tests/client/test_wire_*.py)
of-archiver := tests/archiver $(PACKAGED:%=--ignore=%)
of-client := tests/client $(WIRE:%=--ignore=%)
of-e2e := tests/e2e tests/server/test_trust.py
of-handlers := tests/handlers
of-packaged := $(PACKAGED)
of-server := tests/server $(WATCHED:%=--ignore=%) --ignore=tests/server/test_trust.py
of-watched := $(WATCHED)
of-watching := tests/watching tests/page
of-wire := $(WIRE)
of-rest := tests $(patsubst %,--ignore=tests/%,archiver client e2e handlers kserve page server watching)
# Plugins of pytest that only these parts need take a second to import.
without = $(if $(filter e2e,$(1)),,-p no:schemathesis) -p no:zarr
# KServe's model server has no release for Python 3.14.
KSERVE := $(if $(wildcard .venv/lib/python3.14),,test-kserve)
PARTS := $(patsubst %,part-%,rest e2e watched archiver server watching client wire handlers) $(KSERVE) part-packaged lint
in_parts = @$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) --output-sync=target

check: .venv/installed ## Lint, type-check, and run the tests that start no process: about a minute
	$(in_parts) MARKS="not slow and not docker and not gpu" lint part-handlers part-rest part-server part-client part-wire

test: install prometheus chromium page-tools kubectl ## Set up, lint, type-check, and run every test that needs no Docker, no GPU and no cluster
	$(in_parts) parts

parts: $(PARTS)

part-%:
	$(BIN)/pytest -q -m "$(MARKS)" $(call without,$*) $(of-$*)

thorough: ## make test with all cases: two to four times as many generated ones, and all variants
	CONVSCOPE_THOROUGH=1 $(MAKE) test

prometheus: ## Fetch Debian's Prometheus into .tools/ for the tests of rules and dashboards, if there is none
	tests/watching/fetch.sh

chromium: ## Fetch Debian's headless Chromium into .tools/ for the tests of the pages, if there is none
	tests/page/fetch.sh

page-tools: ## Fetch what bundles the page, for the test of the bundle, if node and npm are here
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory lens/web/node_modules || echo "no packages for the page's bundle: its test is skipped" >&2; fi

page: lens/web/node_modules ## Bundle the page of lens/web into the package (needs node and npm)
	cd lens/web && npm run --silent build

lens/web/node_modules: lens/web/package-lock.json
	cd lens/web && npm ci --silent --no-audit --no-fund
	@touch $@

kubectl: ## Fetch a kubectl that renders kustomizations into .tools/ for the tests of deploy/kubernetes, if there is none
	tests/kubernetes/fetch.sh

lint: .venv/installed ## Check style and types
	@$(MAKE) --no-print-directory -j style mypy pyright

style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy pyright:
	$(BIN)/$@

format: .venv/installed ## Put the code into the common format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv-client/installed: requirements/client.txt client/pyproject.toml
	$(need_python)
	$(PYTHON) -m venv .venv-client
	$(call pip_install,.venv-client) --require-hashes --no-deps -r requirements/client.txt
	$(call pip_install,.venv-client) --no-deps --no-build-isolation -e ./client
	@touch $@

test-client: .venv-client/installed ## Run the client's tests in an environment without torch
	.venv-client/bin/pytest tests/client

test-gpu: .venv/installed ## Run the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu

# behind,ENVIRONMENT: has it see .venv's torch and the rest behind its own packages.
behind = $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/convscope.pth

# The rivals are kept apart from what we ship.
.venv-bench/installed: .venv/installed benchmarks/requirements.txt
	$(BIN)/python -m venv .venv-bench
	$(call pip_install,.venv-bench) --require-hashes --no-deps -r benchmarks/requirements.txt
	$(call behind,.venv-bench)
	@touch $@

# KServe's model server wants another psutil and protobuf than TorchServe and its tools.
.venv-kserve/installed: .venv/installed requirements/kserve.txt
	$(BIN)/python -m venv .venv-kserve
	$(call pip_install,.venv-kserve) --require-hashes --no-deps -r requirements/kserve.txt
	$(call behind,.venv-kserve)
	@touch $@

kserve: .venv-kserve/installed ## Serve every archive of model_store/ in KServe's model server until Ctrl-C
	.venv-kserve/bin/python -m server.kserve

test-kserve: .venv-kserve/installed ## Run the tests of KServe's model server
	.venv-kserve/bin/python -m pytest -q -p no:zarr tests/kserve

bench: .venv-bench/installed ## Measure our service beside its rivals: the standard set, half an hour
	.venv-bench/bin/python -m benchmarks

bench-full: .venv-bench/installed ## Measure every workload on every network: hours
	.venv-bench/bin/python -m benchmarks --full

test-docker: .venv/installed ## Build the image and test the compose file (needs a Docker engine with Compose)
	$(BIN)/pytest -m docker tests/docker
	$(BIN)/pytest -m "docker and not long" tests/drill

# Commands of the shell, by the environment: tests/kubernetes/cluster.py.
test-kubernetes: .venv/installed kubectl ## Deploy to the cluster that KUBECONFIG names, and change it under load (needs Docker for the images)
	$(BIN)/pytest -m kubernetes tests/kubernetes

drill: .venv/installed ## Cause every incident of tests/drill on a stack of its own and check the alerts; DOCS=yes updates docs/operations.md: 70 minutes
	$(BIN)/pytest -s tests/drill
	$(if $(DOCS),$(BIN)/python -m tests.drill.table)

campaign: .venv/installed ## Send 10^6 generated requests, valid and hostile, to a service of its own: 45 minutes
	$(BIN)/python -m tests.campaign

# The operator's commands need Docker, openssl and Python 3.9 or newer, and no .venv.
OPERATE := python3 -m deploy.commands
# What is given on the command line, and not by the environment, reaches the shell as an argument, whatever is in it.
given = $(if $(filter command,$(firstword $(origin $(1)))),$(value $(1)))
override NAME := $(call given,NAME)
override CERT := $(call given,CERT)
override KEY := $(call given,KEY)
override OUT := $(call given,OUT)
override REPLICA := $(call given,REPLICA)
export NAME CERT KEY OUT REPLICA

secrets: ## Make what is missing in secrets/: a test certificate, API keys, Grafana's password; say what is there
	@$(OPERATE) secrets

key: ## Add an API key: NAME=alice, and OUT=file to write it there instead of showing it
	@$(OPERATE) key $(if $(OUT),--output "$$OUT") -- "$$NAME"

revoke: ## Take an API key away: NAME=alice
	@$(OPERATE) revoke -- "$$NAME"

keys: ## List who has an API key
	@$(OPERATE) keys

certificate: ## Put a certificate in place and see it served: CERT=fullchain.pem KEY=privkey.pem, or TEST=yes
	@$(OPERATE) certificate $(if $(CERT),--cert "$$CERT") $(if $(KEY),--key "$$KEY") $(if $(filter yes,$(TEST)),--test)

check-config: ## Check the configuration of gateway, Prometheus, Alertmanager and Compose without using it
	@$(OPERATE) check-config

replicas: ## List the replicas: which are ready, why not, their memory, since when
	@$(OPERATE) replicas

restart: ## Restart one replica: REPLICA=name, and FORCE=1 if it is the only one that is ready
	@$(OPERATE) restart $(if $(filter 1,$(FORCE)),--force) -- "$$REPLICA"

update: ## Replace the replicas one by one, by CONVSCOPE_REPLICAS with the current archives, image and settings
	@$(OPERATE) update

archives: .venv/installed ## Rebuild the archives of model_store/ from handlers/ and their own weights
	$(BIN)/python -m archiver --refresh

proto: .venv/installed .venv-proto/installed ## Generate the code of proto/*.proto, and of openapi.yaml the JSON that the gateway serves
	.venv-proto/bin/python proto/generate.py
	$(BIN)/python -c "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin), ensure_ascii=False, separators=(',', ':')))" <proto/openapi.yaml >deploy/envoy/openapi.json

lock: ## Pin requirements/*.txt anew (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --fork-strategy fewest --no-header -q -o requirements/service.txt
	uv pip compile pyproject.toml --all-extras --no-emit-package openvino-telemetry -c requirements/service.txt --universal --python-version 3.11 --generate-hashes --fork-strategy fewest --no-header -q -o requirements/dev.txt
	uv pip compile client/pyproject.toml requirements/client.in --all-extras -c requirements/dev.txt --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/client.txt
	uv pip compile client/pyproject.toml requirements/probe.in -c requirements/service.txt --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/probe.txt
	sed -nE '/^(psutil|protobuf)==/d; s/^([a-z0-9._-]+==[^ ;\\]+).*/\1/p' requirements/service.txt \
	  | uv pip compile --group kserve -c - --universal --python-version 3.11 --generate-hashes --fork-strategy fewest --no-header -q -o requirements/kserve.txt
	sed -nE '/^(psutil|protobuf)==/d; s/^([a-z0-9._-]+==[^ ;\\]+).*/\1/p' requirements/service.txt \
	  | uv pip compile --group slim -c - -c requirements/kserve.txt --universal --python-version 3.11 --generate-hashes --fork-strategy fewest --no-header -q -o requirements/slim.txt
	uv pip compile requirements/sbom.in -c requirements/dev.txt --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/sbom.txt
	uv pip compile requirements/proto.in --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/proto.txt
	uv pip compile requirements/openvino.in -c requirements/dev.txt --universal --python-version 3.11 --generate-hashes --no-header -q --no-emit-package openvino-telemetry --no-emit-package numpy -o requirements/openvino.txt
	uv pip compile requirements/tracing.in -c requirements/dev.txt --universal --python-version 3.11 --generate-hashes --no-header -q -o requirements/tracing.txt
	grep -oE '^(numpy|onnx[a-z-]*|pillow)==[^ ]+' requirements/dev.txt | uv pip compile benchmarks/requirements.in -c /dev/stdin --universal --python-version 3.11 --generate-hashes --no-header -q -o benchmarks/requirements.txt

pin: ## Pin the images of others by digest, where their registries can be reached (needs Docker with buildx)
	python3 deploy/pin.py

clean: ## Remove the environments, tools and results that the other targets made; keeps secrets/ and logs/
	rm -rf .venv .venv-client .venv-proto .venv-bench .venv-kserve .tools lens/web/node_modules out runs
