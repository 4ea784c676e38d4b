# Everything a fresh clone needs. `make demo` and `make test` set themselves up in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed first, so that no later package pulls a larger build of torch. Another release: make TORCH=torch==2.12.0 test
TORCH ?= torch==2.13.0
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint docs lowest benchmark clean

demo: $(VENV)/.demo
	$(BIN)/dc-merge demo -o dc-merge-demo --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The lower bounds of pyproject.toml. Other packages' warnings of those days are no errors, and the loopback Hub speaks with
# the client of today. This torch has no CPU build everywhere and may come with gigabytes of CUDA.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -e ".[demo,test]" -c tests/lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto --maxprocesses 4 -o filterwarnings=default \
		--ignore tests/support --ignore-glob 'tests/io/test_hub*' --ignore tests/io/test_card.py \
		--ignore tests/io/test_security_files.py --ignore tests/test_notebooks.py

benchmark: $(VENV)/.demo
	$(BIN)/python examples/benchmarks/factor_space.py --size 1024 1024 --peft-modules 0

clean:
	rm -rf $(VENV) dc-merge-demo site

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

# The tests run the demo's code too; the demo needs nothing of the tests.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[demo,test]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@
