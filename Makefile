# Commands for a machine with Python 3.11+, pip and make. Everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.PHONY: demo test test-portable lint bench replicate league docs clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lab: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[lab]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[test,docs]'
	touch $@ $(VENV)/.lab

demo: $(VENV)/.lab  ## compare starts and an optimizer on a deep net, in a minute; leaves report.html
	$(BIN)/pondera compare deep --init lsuv --init orthogonal --optim "SGD(momentum=0.9)" \
		--seeds 5 --budget 100 --rates 0.001,0.003,0.01,0.03 --report report.html

test: lint  ## everything that must hold; the tests' own extras are installed first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The three libraries that do the arithmetic, each on its oldest kernels: another order of summing, other last places.
# Only where results are compared closely, to stay under a minute; compiled steps, slow to build, are left out.
test-portable: $(VENV)/.test  ## part of the tests again, as an older CPU would round; `make test` comes first
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -k "not compile" \
		tests/adapters tests/merge tests/linalg tests/cli/test_merge.py src/pondera/adapters src/pondera/merge \
		$(addprefix tests/conformance/test_,adapters.py nn.py optim.py parametrize.py penalties.py)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test  ## ours, peer, ratio; make bench QUICK=1: fewer and smaller cases, nothing recorded
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

replicate: $(VENV)/.test  ## re-run the papers' claims and record them: make replicate KEY=lsuv
	$(BIN)/pondera reproduce $(or $(KEY),--all) --sham --save evidence

league: $(VENV)/.test  ## compare all starts on the built-in tasks again, for docs/league: make league TASK=digits
	OMP_NUM_THREADS=1 $(BIN)/python docs/_league.py $(TASK)

docs: $(VENV)/.test  ## the site, into site/
	$(BIN)/sphinx-build -W --keep-going -q -b html docs site

clean:
	rm -rf $(VENV) site report.html
