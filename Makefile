# Every target makes the virtual environment that it needs, and updates it when the files that
# describe it change. For another interpreter: make PYTHON=python3.13 clean test

PYTHON ?= python3
ARGS ?=
SECONDS ?= 60
SYSTEM ?= sid

VENV := .venv
BIN  := $(VENV)/bin
# Pinned versions, also for the runtime dependencies.
PIP  := $(BIN)/python -m pip --quiet --disable-pip-version-check install --constraint requirements-dev.txt

.PHONY: help demo run test elsewhere lint format types docs links reference package bench figures stress fuzz clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.runtime  ## a tour on real descriptors, with a daemon of its own
	$(BIN)/python scripts/demo.py $(ARGS)

run: $(VENV)/.runtime  ## the daemon, in the foreground (ARGS="--socket /tmp/q.sock")
	$(BIN)/qmpfd serve $(ARGS)

test: $(VENV)/.dev  ## the tests (ARGS="-n auto -k fdsets")
	$(BIN)/python -m pytest $(ARGS)

elsewhere:  ## the tests in another Debian, with its newest Python; as root (SYSTEM=trixie ARGS="-n auto")
	scripts/elsewhere.sh --system $(SYSTEM) make test ARGS='$(ARGS)'

lint: $(VENV)/.dev  ## check the rules of ruff and flake8-async, and the formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/flake8

format: $(VENV)/.dev  ## format the code, and apply the fixes of ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the documentation, into build/docs; checks the links between its pages
	rm -rf build/docs/html
	$(BIN)/sphinx-build -q -W --keep-going -E -b html docs build/docs/html
	$(BIN)/python docs/check_links.py build/docs/html

links: $(VENV)/.docs  ## check the documentation's links to other sites; needs the network
	$(BIN)/sphinx-build -q -W --keep-going -E -b linkcheck docs build/docs/links

reference: $(VENV)/.docs  ## write the generated parts of docs/reference, and the manual pages
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -q -W --keep-going -E -b man docs packaging/man
	rm -rf packaging/man/.doctrees

package: $(VENV)/.package  ## build sdist and wheel, and try them in an empty environment
	$(BIN)/python scripts/check_package.py $(ARGS)

bench: $(VENV)/.dev  ## measure the CPU time of a command, beside other servers
	$(BIN)/python scripts/bench.py $(ARGS)

figures: $(VENV)/.dev  ## the same, and write the numbers and plots of docs/performance.md
	$(BIN)/python scripts/bench.py --report docs/bench --page docs/performance.md $(ARGS)

stress: $(VENV)/.dev  ## hostile clients and kill -9 (ARGS="--clients 50 --seconds 5")
	$(BIN)/python scripts/stress.py $(ARGS)

fuzz: $(VENV)/.fuzz  ## coverage-guided fuzzing of the protocol, for a minute (SECONDS=600)
	@mkdir -p $(VENV)/corpus
	cd tests && ../$(BIN)/python fuzz/fuzz.py -max_total_time=$(SECONDS) -max_len=500 \
		-dict=fuzz/qmp.dict -artifact_prefix=../$(VENV)/ ../$(VENV)/corpus fuzz/corpus

clean:  ## remove everything that these targets made, the environment too
	rm -rf $(VENV) build dist .coverage .coverage.* htmlcov .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find qmpfd tests scripts docs -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.runtime: pyproject.toml requirements-dev.txt qmpfd/_version.py
	@echo "Installing qmpfd into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/.fuzz: $(VENV)/.dev requirements-fuzz.txt
	@$(PIP) --requirement requirements-fuzz.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.dev requirements-docs.txt
	@echo "Installing Sphinx into $(VENV)"
	@$(PIP) --requirement requirements-docs.txt
	@touch $@

$(VENV)/.package: $(VENV)/.dev requirements-package.txt
	@echo "Installing pyright into $(VENV)"
	@$(PIP) --requirement requirements-package.txt
	@touch $@
