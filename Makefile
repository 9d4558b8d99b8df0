# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.10 or later, make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: demo demo-full test test-slow lint lock bench install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints/tested.txt .ci/install.py
	$(PYTHON) .ci/install.py $(VENV)

# The whole main job on moving shapes. Every line is a command of its own and continues where it was interrupted.
demo: DEMO = demo
demo: CLIPS = 1000
demo: VAE_STEPS = 460
demo: DIT_STEPS = 700
demo: SHAPES = 64x64x17 96x48x17 64x64x25
demo-full: DEMO = demo-full
demo-full: CLIPS = 3000
demo-full: VAE_STEPS = 1500
demo-full: DIT_STEPS = 4000
demo-full: SHAPES = 64x64x17 80x48x17 48x80x17 64x64x9 80x48x9 48x80x9 96x48x17 64x64x25
demo demo-full: install
	stdit data toy $(DEMO)/videos --clips $(CLIPS)
	stdit data scan $(DEMO)/videos/train --out $(DEMO)/manifest.parquet
	stdit data scan $(DEMO)/videos/held_out --out $(DEMO)/held_out.parquet
	stdit train toy/vae run=$(DEMO)/vae data.manifest=$(DEMO)/manifest.parquet \
		eval.manifest=$(DEMO)/held_out.parquet schedule.steps=$(VAE_STEPS)
	stdit data encode $(DEMO)/manifest.parquet --config toy/dit --out $(DEMO)/cache \
		vae.path=$(DEMO)/vae/model/vae
	stdit train toy/dit run=$(DEMO)/dit data.manifest=$(DEMO)/manifest.parquet \
		data.cache=$(DEMO)/cache vae.path=$(DEMO)/vae/model/vae schedule.steps=$(DIT_STEPS)
	stdit eval toy --model $(DEMO)/dit/model --out $(DEMO)/dit --held-out $(DEMO)/videos/held_out --steps 12 \
		--guidance 4 $(SHAPES:%=--shape %)
	stdit sample --model $(DEMO)/dit/model --prompt "a large green circle moving right on a black background" \
		--aspect 2:1 --resolution 48 --duration 2s --out $(DEMO)/samples
	@echo "Look at $(DEMO)/dit/report.html and $(DEMO)/samples"

test: install
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install
	python -m pytest -q -m slow

lint: install
	ruff check .
	ruff format --check .
	mypy

# What constraints/ holds, anew: the newest versions (below a bound, if one is given) and the oldest that pyproject admits.
lock: BOUND = torch==2.14.1 torchvision==0.29.1
lock: install
	python -m pip install --quiet uv
	rm -f constraints/*.txt
	printf '%s\n' $(BOUND) | uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --extra train \
		--extra dev --constraints - --output-file constraints/tested.txt pyproject.toml
	uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --extra train --extra dev \
		--resolution lowest-direct --output-file constraints/oldest.txt pyproject.toml

bench: install
	python benchmarks/transformer_step.py
	python benchmarks/planner.py
