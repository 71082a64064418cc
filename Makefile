# Two commands: `make run` plans a run for an RTX 4070 and trains a small model here; `make test` tests.
# `make check` is what a change has to pass beside the tests.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
WORKERS ?= 2

.PHONY: run test check docs format clean

run: $(INSTALLED)
	$(BIN)/gptfit plan --gpu rtx4070
	rm -rf out/demo
	$(BIN)/gptfit train --auto-fit --out out/demo

test: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(INSTALLED)
	$(BIN)/python tests/test_docs.py
	$(BIN)/python tests/test_screens.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# pip knows dependency groups from 25.1 on, and a new venv has the pip that came with Python.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group dev -c constraints.txt
	touch $@

clean:
	rm -rf .venv out dist
