# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
MARK := .venv/.installed

.PHONY: demo test lint types unit slow docs coverage bench clean

demo: $(MARK)
	$(BIN)/secateur demo --out demo-out

test: lint types unit

lint: $(MARK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(MARK)
	$(BIN)/mypy

unit: $(MARK)
	$(BIN)/pytest

slow: $(MARK)
	$(BIN)/pytest -m "slow or not slow"

docs: $(MARK)
	$(BIN)/mkdocs build --strict

$(MARK): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	touch $(MARK)

clean:
	rm -rf .venv demo-out demo-out.work site
