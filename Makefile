# make repro | make test | make lint, each from nothing: the first one sets up .venv from requirements.lock.
PYTHON ?= python3
EXPERIMENT ?= smoke
ARCHIVE ?= outputs/$(EXPERIMENT).tar.xz
INTO ?= outputs/carried/$(EXPERIMENT)
PYTHONS ?= python3.11 python3.12 python3.13
UV_VERSION := 0.13.8
TRITON_VERSION := 3.7.1 # of the pinned torch, whose CPU build has none
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: repro plan pack unpack carry test test-all lint docs coverage package lock help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv==$(UV_VERSION)
	uv pip install --quiet --python .venv/bin/python -r requirements.lock
	uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	.venv/bin/python -m compileall -q -j 0 .venv/lib || true
	touch $@

repro: .venv/installed ## run EXPERIMENT (smoke, local, hour, paper, ...): every stage that is not up to date; MINUTES=9: so long
	python -m finetune.store.experiment experiments/$(EXPERIMENT).yaml params.yaml
	$(if $(MINUTES),python -m finetune.runs.slices params.yaml --dvc --minutes $(MINUTES),dvc repro)

plan: .venv/installed ## time by kind of card, memory, disk and judge calls that EXPERIMENT needs; after it, what it took
	python experiments/plan.py experiment=experiments/$(EXPERIMENT).yaml

pack: .venv/installed ## what EXPERIMENT wrote, without weights, as one ARCHIVE of at most 16 MB
	python -m finetune.store.pack experiments/$(EXPERIMENT).yaml $(ARCHIVE)

unpack: .venv/installed ## take ARCHIVE into results, and let dvc take it as done; COMMIT=...: of another commit
	python -m finetune.store.unpack $(ARCHIVE) $(COMMIT)

carry: .venv/installed ## what EXPERIMENT's runs need on a machine with torch, transformers, accelerate and peft alone, as a folder INTO
	python -m finetune.store.experiment experiments/$(EXPERIMENT).yaml params.yaml
	dvc repro basis
	python -m finetune.runs.carry experiments/$(EXPERIMENT).yaml $(INTO)

test: .venv/installed ## the default tests: CPU, offline, short
	python -m pytest -q -n auto --dist worksteal

test-all: .venv/installed ## the slow ones too
	python -m pytest -q -n auto --dist worksteal -m "slow or not slow"

lint: .venv/installed ## ruff; types: the library's strict, the comparison's basic
	ruff check . && ruff format --check .
	basedpyright -p src/sparsegrad
	basedpyright # what stands in .basedpyright/baseline.json is known; it shrinks by itself

docs: .venv/installed ## the site with the API reference: outputs/site/index.html; offline
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet

coverage: .venv/installed ## lines and branches of src/sparsegrad that its tests run; Triton's kernels by its interpreter
	rm -rf outputs/coverage && mkdir -p outputs/coverage
	uv pip install --quiet --no-deps --target outputs/coverage/triton triton==$(TRITON_VERSION)
	PYTHONPATH=$(CURDIR)/outputs/coverage/triton python -m coverage run -m pytest -q -p no:xdist tests/sparsegrad
	python -m coverage combine --quiet && python -m coverage report

package: ## build the wheel, and use it in an empty environment for each of PYTHONS (minutes, network): results/library/package.json
	$(PYTHON) experiments/package.py $(PYTHONS)

lock: .venv/installed ## pin what requirements*.in have new; pins stay, unless UPGRADE=--upgrade
	uv pip compile --quiet --python-version 3.11 --no-annotate --no-header $(UPGRADE) requirements.in requirements-dev.in -o requirements.lock
	sed -i -e 's/+cpu$$//' -e '/^\(cuda\|nvidia\)-\|^triton==/d' requirements.lock  # torch's build is the machine's choice
	python -c 'from pathlib import Path; pins = Path("requirements.lock").read_text().split(); head = Path("environment.yml").read_text().split("      - ")[0]; Path("environment.yml").write_text(head + "".join(f"      - {pin}\n" for pin in pins))'
