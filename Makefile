# `make help` lists the targets. `make demo` and `make test` set everything up on a fresh machine that has Python 3.10 or
# later, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: help demo demo-full test test-slow lint docs lock bench install

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## install the versions that were tested together, in .venv

$(VENV)/.installed: pyproject.toml constraints/tested.txt .ci/install.py
	$(PYTHON) .ci/install.py $(VENV)

docs: install  ## write docs/settings.md, the list of all settings, from the code
	python docs/settings.py

# The whole job on moving shapes. Each line is a command of its own and continues where it was interrupted.
demo:  ## train a small text-to-video model on a CPU and sample it, 10 to 16 minutes
demo-full:  ## the same with more clips and steps
demo: DEMO = demo
demo: CLIPS = 1000
demo: VAE_STEPS = 740
demo: DIT_STEPS = 950
demo: SHAPES = 64x64x17 96x48x17 64x64x25
demo demo-full: VAE_OPTIONS =
demo demo-full: DIT_OPTIONS =
demo-full: DEMO = demo-full
demo-full: CLIPS = 3000
demo-full: VAE_STEPS = 3000
demo-full: DIT_STEPS = 4000
demo-full: SHAPES = 64x64x17 80x48x17 48x80x17 64x64x9 80x48x9 48x80x9 96x48x17 64x64x25
demo demo-full: install
	stdit data toy $(DEMO)/videos --clips $(CLIPS)
	stdit data scan $(DEMO)/videos/train --out $(DEMO)/manifest.parquet
	stdit data scan $(DEMO)/videos/held_out --out $(DEMO)/held_out.parquet
	stdit train toy/vae run=$(DEMO)/vae data.manifest=$(DEMO)/manifest.parquet \
		eval.manifest=$(DEMO)/held_out.parquet schedule.steps=$(VAE_STEPS) $(VAE_OPTIONS)
	stdit data encode $(DEMO)/manifest.parquet --config toy/dit --out $(DEMO)/cache \
		vae.path=$(DEMO)/vae/model/vae
	stdit train toy/dit run=$(DEMO)/dit data.manifest=$(DEMO)/manifest.parquet \
		data.cache=$(DEMO)/cache vae.path=$(DEMO)/vae/model/vae schedule.steps=$(DIT_STEPS) $(DIT_OPTIONS)
	stdit eval toy --model $(DEMO)/dit/model --out $(DEMO)/dit --held-out $(DEMO)/videos/held_out --steps 12 \
		--guidance 4 $(SHAPES:%=--shape %)
	stdit sample --model $(DEMO)/dit/model --prompt "a large green circle moving right on a black background" \
		--aspect 2:1 --resolution 48 --duration 2s --out $(DEMO)/samples
	@echo "Look at $(DEMO)/dit/report.html and $(DEMO)/samples"

test: install  ## run the tests, in about 13 minutes on two cores
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install  ## run the tests that take more than a minute each
	python -m pytest -q -m slow

lint: install  ## run ruff and mypy
	ruff check .
	ruff format --check .
	mypy

# Writes constraints/ anew: the newest versions (below BOUND) and the oldest that pyproject admits.
lock:  ## take newer versions into constraints/
lock: BOUND = torch==2.14.1 torchvision==0.29.1
lock: install
	python -m pip install --quiet uv
	rm -f constraints/*.txt
	printf '%s\n' $(BOUND) | uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --extra train \
		--extra dev --constraints - --output-file constraints/tested.txt pyproject.toml
	uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --extra train --extra dev \
		--resolution lowest-direct --output-file constraints/oldest.txt pyproject.toml

bench: install  ## run the two main benchmarks
	python benchmarks/transformer_step.py
	python benchmarks/planner.py
