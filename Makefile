# `make demo` and `make test` are all the set-up there is: the first run makes .venv.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
bin := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/.jrope
	$(bin)/python examples/demo.py

test: $(VENV)/.jrope-test
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.jrope-test
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --pythonpath $(bin)/python

$(bin)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.jrope: pyproject.toml | $(bin)/pip
	@echo "installing jrope into $(VENV) ..."
	$(bin)/python -m pip install --quiet --editable .
	@touch $@

# torch goes first and alone: asked for among others, it may be chosen in another build
$(VENV)/.jrope-test: $(VENV)/.jrope
	@echo "installing what the tests need into $(VENV) ..."
	$(bin)/python -m pip install --quiet torch==2.13.0
	$(bin)/python -m pip install --quiet --editable ".[test]"
	@touch $@
