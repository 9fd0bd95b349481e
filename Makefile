# `make demo` and `make test` work on a fresh clone; both set up .venv once and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check peers benchmark benchmark-certificates benchmark-training benchmark-evaluation format clean help

help:
	@echo "make demo    train, attack, certify and report on digits (CPU, fifteen to thirty minutes)"
	@echo "make test    run the tests"
	@echo "make check   ruff, mypy and the tests"
	@echo "make peers   install the peer attack libraries and compare our attacks with theirs (about ten minutes)"
	@echo "make benchmark  time our attacks beside theirs into results/benchmarks (about a quarter of an hour on two cores)"
	@echo "make benchmark-certificates  what certificates cost beside Cohen's, PatchCleanser's and ART's (hours on a CPU; goes on if killed)"
	@echo "make benchmark-training  images per second of our training loop beside a plain one with torchattacks (about ten minutes)"
	@echo "make benchmark-evaluation  the standard protocol beside one put together from torchattacks, foolbox and ART (under an hour on one core; goes on if killed)"
	@echo "make format  reformat the code"
	@echo "make clean   remove the environment, caches and demo output"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("AMSDN needs Python >= 3.11, found %d.%d; run: make PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing AMSDN and PyTorch into $(VENV) (once, several GB, a few minutes) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) (once) ..."
	$(PIP) -e '.[dev]'
	@touch $@

# torchattacks asks for an old requests, which nothing here calls: it is installed without its dependencies.
$(VENV)/.installed-peers: pyproject.toml $(VENV)/.installed-dev
	@echo "Installing the peer libraries into $(VENV) (once) ..."
	$(PIP) -e '.[peers]'
	$(PIP) --no-deps 'torchattacks>=3.5'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/amsdn demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

peers: $(VENV)/.installed-peers
	$(BIN)/python -m pytest tests/peers -rs $(ARGS)

benchmark: $(VENV)/.installed-peers
	$(BIN)/python benchmarks/attacks.py $(ARGS)

benchmark-certificates: $(VENV)/.installed-peers
	$(BIN)/python benchmarks/certification.py $(ARGS)

benchmark-training: $(VENV)/.installed-peers
	$(BIN)/python benchmarks/training.py $(ARGS)
	$(BIN)/python scripts/benchmark_tables.py write

benchmark-evaluation: $(VENV)/.installed-peers
	$(BIN)/python benchmarks/evaluation.py $(ARGS)
	$(BIN)/python scripts/benchmark_tables.py write

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis runs checkpoints
