# Each command makes .venv and installs what it needs; a second run starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_CKPT := .demo/base

.PHONY: demo test test-slow lint docs

demo: $(VENV)/.demo $(DEMO_CKPT)/model.safetensors
	$(BIN)/siglip2-packed align --ckpt $(DEMO_CKPT) --device cpu --use-real-images
	$(BIN)/siglip2-packed show --ckpt $(DEMO_CKPT) --device cpu --use-real-images --against transformers \
		--out .demo/panel.png --html .demo/report.html

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/biome lint --config-path=.ci --error-on-warnings siglip2_packed/inspection

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DEMO_CKPT)/model.safetensors: | $(VENV)/.demo
	$(BIN)/siglip2-packed random-checkpoint $(DEMO_CKPT) --shape base --full

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: pyproject.toml
	@echo "installing into $(VENV): torch and what needs it, which takes minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(patsubst .%,%,$(notdir $@))]'
	touch $@
