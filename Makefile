# One word per task. Every word makes .venv from the lock first, where it is missing or out of date.
#
#   make serve PORT=4000 SD_MODEL=shapes     any setting can be given like this
#   make test ARGS="-k planner"              ARGS is passed on to the tool
#   make install PYTHON=python3.12           the interpreter of a new .venv

PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& { echo $$python; break; }; done)
PYTHON312 ?= $(shell for python in python3.12 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE := .venv-docs
# One process more than there are cores: many tests wait for a server.
PYTEST := pytest -q --numprocesses $(shell expr $$(nproc 2>/dev/null || echo 2) + 1) --maxprocesses 5 \
	--dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install serve test test-long coverage check docs docs-serve docs-check docs-fuzz docs-fuzz-short bench bench-cold bench-gpu gpu-wheels gpu-rehearsal soak emoji-carry lock sbom image image-smoke chart

help: ## show these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything that the lock pins

serve: $(STAMP) ## serve on http://localhost:3000; takes PORT, HOST, SD_MODEL, PRECISION, ...
	@exec $(BIN)/sdbento serve $(if $(PORT),--port '$(PORT)') $(if $(HOST),--host '$(HOST)')

test: $(STAMP) ## run the tests, several files at once; ARGS="-n0 --pdb" stops at the first that fails
	@$(BIN)/python -m $(PYTEST) -m 'not long' $(ARGS)

test-long: $(STAMP) ## run the tests that take long: compilers, whole benchmarks, crashes
	@$(BIN)/python -m $(PYTEST) -m long $(ARGS)

coverage: $(STAMP) ## run the tests and name the lines that none of them reaches
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m $(PYTEST) $(ARGS); status=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

check: $(STAMP) ## lint, formatting, types, licences, known vulnerabilities
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m tools.licences
	@$(BIN)/python -m tools.audit

docs: $(SITE)/.installed ## build the documentation as a website in site/, links checked
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict $(ARGS)

docs-serve: $(SITE)/.installed ## serve it on http://localhost:8000, and again after every change
	@NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs serve $(ARGS)

docs-check: $(STAMP) ## validate the OpenAPI document, and see that every route is in it
	@$(BIN)/python -W ignore -m tools.docs_check

docs-fuzz: $(STAMP) ## send a server what its OpenAPI document allows and forbids, for some minutes
	@$(BIN)/python -W ignore -m tests.fuzz $(ARGS)

docs-fuzz-short: $(STAMP) ## the same in a minute: a few requests for each route
	@$(BIN)/python -W ignore -m tests.fuzz --phases examples,fuzzing,stateful --max-examples 3 $(ARGS)

bench: $(STAMP) ## measure throughput and latency over HTTP
	@$(BIN)/python -m bench.http $(ARGS)

bench-cold: $(STAMP) ## measure the time from a start to the first image, stage by stage
	@$(BIN)/python -m bench.cold $(ARGS)

bench-gpu: $(STAMP) ## measure this machine's GPU for nine minutes; ARGS=--toy: on a CPU
	@$(BIN)/python -m bench.gpu $(ARGS)

gpu-wheels: $(STAMP) ## gather what a bare GPU machine lacks, for scripts/gpu-bench
	@$(BIN)/python tools/gpu_wheels.py

gpu-rehearsal: gpu-wheels ## try scripts/gpu-bench here, with the packages of the bare machine
	$(if $(PYTHON312),,$(error the rehearsal needs Python 3.12; name one: make gpu-rehearsal PYTHON312=/path/to/python3.12))
	@PYTHON='$(PYTHON312)' scripts/gpu-rehearsal $(ARGS)

soak: $(STAMP) ## keep a server in bad company: ARGS="mixed --minutes 60"; alone: kill -9 during 100 jobs
	@$(BIN)/python -m tests.soak $(ARGS)

emoji-carry: $(STAMP) training/emoji/out/icons.zip ## gather what scripts/emoji-gpu needs on a machine without a network
	@$(BIN)/python -m training.emoji.carry

training/emoji/out/icons.zip: | $(STAMP)
	@$(BIN)/python -m training.emoji.render

lock: $(STAMP) ## pin what pyproject.toml asks for; ARGS=--upgrade takes the newest
	@$(BIN)/python tools/lock.py $(ARGS)

sbom: $(STAMP) ## list the packages of the image in sbom.cdx.json (CycloneDX)
	@$(BIN)/python -m tools.sbom requirements-gpu.lock sbom.cdx.json

image: $(STAMP) ## build the OCI image with docker, podman or buildah; takes IMAGE, BACKEND, MODEL
	@scripts/image $(ARGS)

image-smoke: $(STAMP) ## build it without an engine, for the CPU, and try it: HTTP, RunPod, registry
	@scripts/image-smoke

chart: $(BIN)/helm ## write configs/kubernetes from charts/sdbento
	@$(BIN)/python -m tools.chart

$(BIN)/helm: tools/helm.py | $(STAMP)
	@$(BIN)/python -m tools.helm $(BIN)

$(STAMP): requirements.lock requirements-dev.lock requirements-cuda.lock pyproject.toml
	$(if $(PYTHON),,$(error sdbento needs Python 3.11 or 3.12; name one: make install PYTHON=/path/to/python3.12))
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) # also a half-made one
	@echo "installing what requirements-dev.lock pins into $(VENV), which takes some minutes"
	@$(BIN)/python tools/install.py
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable . # -q shows setuptools' warning
	@touch $@

$(SITE)/.installed: requirements-docs.lock tools/mermaid.py
	$(if $(PYTHON),,$(error sdbento needs Python 3.11 or 3.12; name one: make docs PYTHON=/path/to/python3.12))
	@$(SITE)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(SITE)
	@echo "installing what requirements-docs.lock pins into $(SITE)"
	@$(SITE)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-docs.lock
	@$(SITE)/bin/python tools/mermaid.py $(SITE)
	@touch $@
