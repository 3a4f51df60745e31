# Everything runs in .venv, which the first target that needs it makes from pyproject.toml and constraints.txt. Runs and
# JupyterLab need the notebooks' packages alone; tests and linters need all.
# pip's own settings (PIP_INDEX_URL, pip.conf, ...) decide where packages come from.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	if $$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
	then echo $$p; break; fi; done)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo quick full smoke baseline whisper baselines_small lab test fresh-environment lint format parameters example clean python

help: ## show this list
	@awk -F ': ## ' '/^[a-z_-]+: ## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  ARGS="..." is passed on, as in make demo ARGS="--force" or make test ARGS="tests/test_runs.py -x"'

demo: ## the whole pipeline on the embedded corpus and model: reports/demo/index.html
quick: ## a published model on a thousand LibriSpeech utterances
full: ## a published model on all of train-clean-100 and both test sets
smoke: ## the whole pipeline on next to nothing, to see that it runs
baseline: ## train again the small model that the repository ships
whisper: ## OpenAI's Whisper tiny.en through the whole pipeline: make whisper ARGS="--set model=DIR corpus=DIR"
baselines_small: ## two encoders with four kinds of attention each, from scratch on the embedded corpus
demo quick full smoke baseline baselines_small: .venv/.notebooks
	.venv/bin/python run_all.py $@ $(ARGS)
whisper: .venv/.notebooks
	.venv/bin/python run_all.py whisper_tiny_en $(ARGS)

lab: ## open JupyterLab on the notebooks
lab: .venv/.notebooks
	.venv/bin/python -m jupyterlab --notebook-dir notebooks $(ARGS)

# One process a core, each with one thread; four at most, for each holds its own torch. A file stays in one process, so
# that fixtures made once per file are made once; files come in the order of tests/conftest.py. (-n auto would count
# physical cores: one on many virtual machines.)
test: ## run the tests
test: .venv/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder $(ARGS)

fresh-environment: ## load an exported folder where asrlib is not: a new venv, a few minutes, 1 GB
fresh-environment: .venv/.installed
	.venv/bin/python tests/fresh_environment.py $(ARGS)

lint: ## check code and notebooks, change nothing
lint: .venv/.installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m nbstripout --verify --keep-id notebooks/*.ipynb
	.venv/bin/lint-imports

format: ## put right what lint finds and a tool can mend
format: .venv/.installed
	.venv/bin/python -m nbstripout --keep-id notebooks/*.ipynb
	.venv/bin/python -m ruff check --fix-only .
	.venv/bin/python -m ruff format .

parameters: ## write docs/parameters.md anew, from the notebooks
parameters: .venv/.installed
	.venv/bin/python -m asrlib parameters --write

example: ## keep a run: make example RUN=demo copies it to reports/examples; PAGES=no: without notebooks' pages and figures
example:
	@test -f "reports/$(RUN)/index.html" || { echo "no run at reports/$(RUN): make example RUN=demo" >&2; exit 1; }
	mkdir -p reports/examples/$(RUN)
	find reports/examples/$(RUN) -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	cd reports/$(RUN) && for page in index.html */index.html; do \
		test -f $$page || continue; folder=`dirname $$page`; mkdir -p ../examples/$(RUN)/$$folder; \
		for part in $$folder/*.html $$folder/*.txt $$folder/params.json $$folder/checksums.sha256 \
			$$folder/rejected $$folder/tables $$folder/figures $$folder/metrics $$folder/predictions; do \
			test ! -e $$part || cp -R $$part ../examples/$(RUN)/$$folder; done; done
	@test "$(PAGES)" != no || cat README.md docs/*.md 2>/dev/null | .venv/bin/python -c "import sys; from pathlib import Path; \
		from asrlib.running.without_pages import leave_pages_out as without; without(Path('reports/examples/$(RUN)'), sys.stdin.read())"
	@.venv/bin/python -c "from pathlib import Path; from asrlib.reporting.runs_page import write_runs_index as index; \
		index(Path('reports/examples').resolve())"
	@du -sh reports/examples/$(RUN)

clean: ## remove .venv and caches; reports stay
	rm -rf .venv *.egg-info build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 with venv on PATH: install one" \
		"(on Debian and Ubuntu: apt-get install python3 python3-venv)" \
		"or name one, as in: make demo PYTHON=/path/to/python3.12" >&2; exit 1; }

# The stamp is made last: an installation that was interrupted is taken up again by the next call. All includes the
# notebooks' packages, so it makes and removes their stamp too. --no-compile: Python compiles what is imported when it is
# imported; compiling all of it here takes half a minute for nothing. But where it must not write what it compiled, even a
# refused parameter would wait for it: what that imports is compiled.
LIGHT = pydantic pydantic_core yaml annotated_types typing_extensions.py
.venv/.notebooks: EXTRA = notebooks
.venv/.installed: EXTRA = dev
.venv/.notebooks .venv/.installed: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory python
	@rm -f .venv/.notebooks
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --no-compile -c constraints.txt -e ".[$(EXTRA)]"
	.venv/bin/python -m compileall -q $(addprefix .venv/lib/python*/site-packages/,$(LIGHT))
	@touch .venv/.notebooks $@

.NOTPARALLEL:  # two installations into one .venv would spoil it
