# make reproduce   set everything up and run the protocol on the embedded digits
# make install     the library, the command line and what they need, into .venv; other targets do it where it is needed
# make test        set everything up and run the tests, in a process of one thread on each core
# make test-fast   the same without tests that take seconds
# make coverage    the same as test-fast, with the share of the library's lines that run; fails below 95 %
# make test-slurm  the same for tests on a real Slurm of two nodes, where Debian's slurm-wlm and munge are installed
# make benchmark   time what results/throughput holds anew; fails where less of the speed-up is realised than there
# make lint        formatting, lint and types
# make docs        the documentation, into site/; fails at a warning

VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: install install-test reproduce test test-fast coverage test-slurm benchmark lint format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[experiments]"
	touch $@

install-test: $(VENV)/.installed-test

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[test,dev]"
	touch $@

reproduce: install
	$(RUN) -W ignore -m experiments reproduce --preset digits

test: install-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not slurm"

test-fast: install-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not slow and not slurm"

coverage: install-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m "not slow and not slurm" --cov --cov-report=term-missing

test-slurm: install-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slurm

benchmark: install
	rm -rf runs/benchmark
	$(RUN) -W ignore -m experiments throughput --against results/throughput --output runs/benchmark

lint: install-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install-test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs build site *.egg-info
