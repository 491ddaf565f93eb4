# Each target sets up what it needs: the environment in .venv, the compiled extension in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The root holds kernels/, which Python must not take for Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test test-gpu gpu-check lint bench asan clean

demo: $(VENV)/.installed
	$(BIN)/tokenexit demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 $(TESTS)

# All tests that run on a GPU, of which one is needed. Most of the time kernels compile: WORKERS at a time.
WORKERS ?= 8
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu -n $(WORKERS) $(TESTS)

# The first questions to a GPU, within BUDGET seconds; any python with torch does (PYTHON=), it builds aside.
BUDGET ?= 465
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --budget $(BUDGET) --workers $(WORKERS) $(STAGES)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# About 20 minutes on two cores; the tagger of `make demo` is trained once more, and kept.
bench: $(VENV)/.bench
	PYTHONPATH=benchmarks $(BIN)/python -m roofline
	PYTHONPATH=benchmarks $(BIN)/python -m cpu
	$(BIN)/python -m pytest -q benchmarks/bench_ops.py --benchmark-columns=median,iqr,rounds \
		--benchmark-sort=fullname

# The tests of the ops over an extension that watches its own memory. Two do not fit such a build: it
# ends the process where an allocation fails, and rounds alike for all instruction sets.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
asan: $(VENV)/.installed
	CFLAGS="$(SANITIZE) -O1" LDFLAGS="$(SANITIZE)" TOKENEXIT_BUILD_EXT=1 \
		$(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 PYTHONPATH=build/asan/lib \
		$(BIN)/python -m pytest -q --capture=sys tests/ops tests/test_int8.py \
		-k "not more_keys_than_fit and not name_is_heard"

clean:
	rm -rf $(VENV) build *.egg-info tokenexit/*.so

# torch comes first and by itself: whatever else asks for it then takes the one that is there.
# seqeval has no wheel: its build needs isolation, to get setuptools_scm with all that it needs.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0 "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install -q --use-pep517 -c constraints.txt seqeval
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e ".[bench]"
	touch $@
