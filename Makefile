# The README's commands. Each sets up what it needs in .venv, so that a fresh clone is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := examples/models/tiny-llama
OUT    := build/tiny-llama-hqq-4bit
# On a machine that already has torch for its GPU, set VENV_ARGS=--system-site-packages.
VENV_ARGS ?=
PYTEST_ARGS ?=

.PHONY: setup setup-test demo test lint format docs test-gpu bench clean

setup: $(VENV)/.runtime
setup-test: $(VENV)/.dev

$(VENV)/.runtime: pyproject.toml constraints/dev.txt
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints/dev.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints/dev.txt torch
	$(BIN)/python -m pip install --quiet -c constraints/dev.txt -e ".[compile]"
	touch $@

# The packages that tests compare with; hqq builds CUDA kernels unless told not to, and neither it nor
# aqlm needs for these tests all that they name.
$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -c constraints/dev.txt -e ".[dev]"
	DISABLE_CUDA=1 $(BIN)/python -m pip install --quiet -c constraints/dev.txt --no-deps --no-build-isolation \
		hqq torchao termcolor bitsandbytes aqlm
	touch $@

demo: setup
	$(BIN)/qcompile $(MODEL) --method hqq --bits 4 -o $(OUT) --overwrite
	$(BIN)/qrun generate $(OUT) --prompt "It was a dark and stormy night" --max-tokens 48 --temperature 0

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# mypy cannot see through the folder mapping of an editable install: it gets the tree as it is imported.
lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/tree && mkdir -p build/tree/qcompiler
	ln -s $(addprefix $(CURDIR)/,$(wildcard qcompiler/*) kernels passes runtime) build/tree/qcompiler/
	MYPYPATH=build/tree $(BIN)/mypy -p qcompiler

format: setup-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site; a broken link or a page without a place fails.
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints/dev.txt -e ".[docs]"
	$(BIN)/python -m benchmarks.tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# On a machine with a GPU: the kernels compiled, not interpreted.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

# Every benchmark of speed in order, on a machine with a GPU; `python -m benchmarks` lists them.
bench:
	$(PYTHON) -m benchmarks --all

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
