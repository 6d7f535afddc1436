PYTHON ?= python3
INSTALLED := .venv/.installed

.PHONY: run test lint

run: $(INSTALLED)  ## the main job on the embedded digits: ten classes, from raw images to the table
	.venv/bin/python main.py --preset quickstart

test: $(INSTALLED) lint
	.venv/bin/python -m pytest -q

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(INSTALLED): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@
