# make demo       train, judge and use a small MobileCLIP on this machine, in minutes      -> runs/demo.html
# make test       everything that must be true, tested (what CI runs)
# make first-hour  time the first commands of a new user  -> results/first_hour.json
# make test-export  conversions of all models of the zoo at their own width, and the homes of exports
# make test-gpu    devices, precision, memory and feeding on a GPU; without one, what stands in
# make test-browser  widgets and apps in a headless browser; screenshots -> runs/browser
# make docs       static site of notebooks and API, links checked  -> _docs
# make lab        JupyterLab on the notebooks
# make weights    train the shipped nano weights again and compare
# make notebooks  run every notebook at nano scale and store its outputs
# make prepare    after editing notebooks: format, export, clean, links, README
PYTHON ?= python3
PIP_ARGS ?=
## ALL: for notebooks and tests; RUNTIMES: besides, for the runtimes and homes of exports
ALL := emoji,train,finetune,eval,search,remote,reinforce,export,coreml,openvino,lab,apps,dense,docs,dev
RUNTIMES := coreai,executorch,litert,homes
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test test-browser test-export test-gpu first-hour docs lab weights notebooks prepare bench clean
help:
	@sed -n 's/^# //p' Makefile

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mobileclip_nb needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 2; }
	@echo "== making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

# one stamp for each set of extras; made again when settings.ini changes
.venv/with-%: .venv/made settings.ini setup.py
	@echo "== installing mobileclip_nb[$*] into .venv (torch is large: the first time takes minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[$*]'
	@touch $@

# the site reads stored outputs and sources: its own requirements are enough, without torch
.venv/with-docs: .venv/made settings.ini
	@sed -n 's/^docs_requirements = //p' settings.ini | xargs $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS)
	@touch $@

docs: .venv/with-docs
	$(BIN)/python docs/make_site.py

demo: .venv/with-emoji,lab
	$(BIN)/mobileclip demo

test: .venv/with-$(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 25 --ignore tests/export tests

test-browser: .venv/with-$(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_browser.py

test-export: .venv/with-$(ALL),$(RUNTIMES)
	if command -v npm > /dev/null; then cd tests/export/js && npm install --ignore-scripts --no-audit --no-fund --silent; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/export tests/test_notebooks.py::test_runtime_pages

test-gpu: .venv/with-$(ALL)
	$(BIN)/python tests/gpu_checks.py

lab: .venv/with-$(ALL)
	$(BIN)/jupyter lab --notebook-dir nbs

weights: .venv/with-emoji,train,lab
	OMP_NUM_THREADS=1 $(BIN)/python -c 'from mobileclip_nb.experiments.shipped_weights import make_all; make_all()'

notebooks: .venv/with-$(ALL)
	SCALE=nano MOBILECLIP_RUNS='$(CURDIR)/results' $(BIN)/python tests/store.py

prepare: .venv/with-$(ALL)
	$(BIN)/ruff format --quiet nbs tests docs setup.py mobileclip_nb/__init__.py
	$(BIN)/python -c 'from nbdev.doclinks import nbdev_export; nbdev_export()'
	$(BIN)/python -c 'from nbdev.clean import nbdev_clean; nbdev_clean()'
	$(BIN)/python tests/links.py
	$(BIN)/python tests/readme.py

first-hour: .venv/with-emoji,lab
	$(BIN)/python tests/first_hour.py

bench: .venv/with-$(ALL)
	$(BIN)/mobileclip bench latency

clean:
	rm -rf .venv runs build _docs *.egg-info
