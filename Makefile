# `make demo` and `make test` are all the set-up there is: the first run makes .venv.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
bin := $(VENV)/bin
libtpu := 'from importlib.metadata import requires; \
  print(*(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))'

.PHONY: demo test test-tpu lint

demo: $(VENV)/.jrope
	$(bin)/python examples/demo.py

test: $(VENV)/.jrope-test
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# libtpu in the release that jax names, in a folder of its own: beside it JAX would look
# for a TPU in every other test.  MODELS=1 compiles those of 8B to 405B, too.
test-tpu: $(VENV)/.libtpu
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/libtpu JROPE_TPU_MODELS=$(MODELS) \
	  $(bin)/python -m pytest tests/test_tpu.py tests/test_tpu_models.py $(ARGS)

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

# torch goes first and alone: asked for among others, it may be chosen in another build.
# lm_eval comes without what only its data sets need, which is half a minute to install.
$(VENV)/.jrope-test: $(VENV)/.jrope
	@echo "installing what the tests need into $(VENV) ..."
	$(bin)/python -m pip install --quiet torch==2.13.0
	$(bin)/python -m pip install --quiet --editable ".[test]"
	$(bin)/python -m pip install --quiet --no-deps lm_eval==0.4.13
	@touch $@

$(VENV)/.libtpu: $(VENV)/.jrope-test
	@echo "installing libtpu into $(VENV)/libtpu ..."
	$(bin)/python -m pip install --quiet --no-deps --target $(VENV)/libtpu \
	  "$$($(bin)/python -c $(libtpu))"
	@touch $@
