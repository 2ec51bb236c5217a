# warploom: `make demo` and `make test` do everything, set-up included. The rest is for those who work on it.
#
#   make demo        a small model of your own in a few minutes
#   make test        the whole test suite, on WORKERS=2 processes (0: in one)
#   make bench       peers and ourselves side by side, ARGS="train"; without ARGS all of it
#   make gpu         on a GPU machine, installing nothing: tests and benchmarks, the most important first, MINUTES=9;
#                    SITE=DIR is one more folder of packages, OUT=DIR one more place for what is found; then MORE=1
#   make sanitize    tests of the tokenizer, kernels, serving, server and training, both extensions under ASan and UBSan
#   make fuzz        the tokenizer under libFuzzer for SECONDS=60, where Clang is
#   make native-test C++ alone: register tiles against plain loops, the thread pools under ThreadSanitizer and in forked children
#   make lint        ruff, and the types that users meet
#   make clean       remove what the others made
#
# PYTHON=python3.12 chooses the interpreter, ARGS="…" passes flags on: make demo ARGS="--steps 200"

PYTHON ?= python3
ARGS ?=
MINUTES ?= 9
SECONDS ?= 60
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
PIP := @PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/* csrc/*/*/*)

export PYTHONPATH :=
export WARPLOOM_REQUIRE_NATIVE := 1

.PHONY: demo demo-chat test bench gpu sanitize native-test fuzz lint format clean
.DELETE_ON_ERROR:  # an interpreter without its build tools is made anew

demo: .venv/ready-base
	$(BIN)/warploom demo $(ARGS)

demo-chat: .venv/ready-chat
	$(BIN)/warploom demo --chat $(ARGS)

# Three runs: PyTorch's operator checks have been seen to fail in a process that had done much else before. Files of
# tests are shared out to WORKERS processes, which take up to 5 GB each, those of slow tests first (tests/conftest.py).
test: .venv/ready-dev
	$(BIN)/python -m pytest $(SHARED) --ignore tests/kernels $(ARGS)
	$(BIN)/python -m pytest $(SHARED) tests/kernels --ignore tests/kernels/test_in_pytorch.py $(ARGS)
	$(BIN)/python -m pytest tests/kernels/test_in_pytorch.py $(ARGS)

bench: .venv/ready-dev
	$(BIN)/warploom bench $(or $(ARGS),all)

gpu: export WARPLOOM_REQUIRE_NATIVE :=
gpu: export WARPLOOM_NATIVE := 0
gpu: export PYTHONPATH := $(CURDIR)/build/path$(if $(SITE),:$(SITE))
gpu:
	@mkdir -p build/path && ln -sfn "$(CURDIR)" build/path/warploom
	$(PYTHON) -m warploom.bench.gpu --minutes $(MINUTES) $(if $(MORE),--more) $(ARGS)

# Tests that reach C++, and those of the engine once more by AVX2's module and by that without AVX. Modules of their own, beside links to the rest of the package.
ENGINE := tests/kernels/cpu tests/engine/serving/execution
SANITIZED := tests/tokenizer $(ENGINE) tests/engine/test_model.py tests/engine/test_executors.py \
	$(addprefix tests/engine/serving/test_,adapters.py calibrate.py llm.py prompt_cache.py structured_output.py) \
	$(addprefix tests/engine/training/test_,golden.py trainer.py) \
	$(addprefix tests/engine/server/test_,adversarial.py faults.py fuzz.py)
sanitize: export PYTHONPATH := $(CURDIR)/build/sanitized
sanitize: export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1
sanitize: export UBSAN_OPTIONS := halt_on_error=1:print_stacktrace=1
sanitize: SANITIZERS = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)"
sanitize: .venv/ready-dev
	@mkdir -p build/sanitized/warploom
	@ln -sfn $(foreach part,__init__.py bench engine kernels tokenizer,"$(CURDIR)/$(part)") build/sanitized/warploom
	WARPLOOM_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitized --build-temp build/sanitized
	$(SANITIZERS) $(BIN)/python -m pytest $(SHARED) $(SANITIZED) --timeout 1500 $(ARGS)
	$(SANITIZERS) ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(SHARED) $(ENGINE) --timeout 1500 $(ARGS)
	$(SANITIZERS) ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest $(SHARED) $(ENGINE) --timeout 1500 $(ARGS)

TILES := csrc/tests/tiles.cpp $(addprefix csrc/cpu/serving/,matrix.cpp dense_matrix.cpp spin_pool.cpp weight_memory.cpp) \
	$(wildcard csrc/cpu/serving/packed_*.cpp)
POOLS := csrc/tests/pools.cpp csrc/cpu/serving/spin_pool.cpp csrc/tokenizer/interruptible_threads.cpp
native-test:
	@mkdir -p build
	$(CXX) -std=c++17 -O2 -Wno-psabi -pthread -Icsrc $(TILES) -o build/tiles
	build/tiles
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -Icsrc $(POOLS) -o build/pools-tsan
	build/pools-tsan
	$(CXX) -std=c++17 -O1 -g -pthread -Icsrc $(POOLS) -o build/pools  # ThreadSanitizer follows no fork
	build/pools

FUZZED := $(filter-out %/module.cpp %/bpe_trainer.cpp %/word_counter.cpp,$(filter-out csrc/tokenizer/bind_%,$(wildcard csrc/tokenizer/*.cpp)))
fuzz:
	@mkdir -p build/corpus
	clang++ -std=c++17 -O1 -g -D_GLIBCXX_ASSERTIONS -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=undefined -pthread -Icsrc csrc/tests/fuzz_tokenizer.cpp $(FUZZED) -o build/fuzz
	build/fuzz build/corpus csrc/tests/corpus -max_total_time=$(SECONDS) -max_len=600 -print_final_stats=1 -verbosity=0

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/types/check.py

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info *.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras: set-up runs again only when the sources of the build change.
.venv/ready-base: $(SOURCES) | .venv/bin/python
	@echo "installing warploom and what it needs (a few minutes the first time: PyTorch is large)"
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

.venv/ready-chat: .venv/ready-base
	$(PIP) install --constraint constraints.txt chitchat-dataset
	@touch $@

.venv/ready-dev: $(SOURCES) | .venv/bin/python
	@echo "installing warploom with its test extras (a few minutes the first time)"
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@ .venv/ready-base

.venv/bin/python:
	@echo "creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt pip setuptools wheel pybind11 ninja
