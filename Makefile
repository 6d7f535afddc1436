PYTHON ?= python3
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: run check test lint

run: $(INSTALLED)  ## the main job on the embedded digits: ten classes, from raw images to the table
	.venv/bin/python main.py --preset quickstart

check: $(INSTALLED)  ## the same, and whether its table is the committed one, results/quickstart.csv
	.venv/bin/python main.py --preset quickstart --check --restart

test: $(INSTALLED_DEV) lint
	.venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED_DEV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@
