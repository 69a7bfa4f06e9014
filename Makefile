# Everything starts from a fresh checkout: Python 3.10+ with its headers, a C++17 compiler, the network for the first `pip install`.
#   make demo   train, compare and time; ends with a table and pictures under demo/
#   make test   all tests
#   make compat on demand: public packages that use torch.nn.RNN, installed under build/, and PyTorch's examples
#   make bench-peers  on demand: the CPU's kernels beside JAX, oneDNN, OpenVINO and others, installed under build/; 25 minutes
#   make fuzz SECONDS=600  random calls against the reference, see tests/fuzz; RESULTS=FILE writes what was run
#   make docs   the documentation as a site under build/site; a warning (a link to nothing, say) is an error
#   make sanitize  the C++ of the CPU under ASan, UBSan and TSan, alone and in Python, some twenty minutes; zero findings
#   make wheel  an sdist and from it manylinux_2_28 wheels under dist/, each tried without a compiler; docs/packaging.md
#   make cuda-all, make test-triton TRITON=3.6.0   checks of other architectures and releases, on demand
#   make gpu    on a machine with a GPU, offline: everything that needs one, in two parts (PART=2); RESULTS=DIR says where to
# FUSED_RIN_CMAKE_ARGS=-DFUSED_RIN_SANITIZE=address|thread builds the CPU part under a sanitizer, see cmake/sanitize.cmake.
# FUSED_RIN_CUDA=auto|on|off: with auto, the CUDA part is built where nvcc is found.
# PYTHON=python3.12 makes the environment of that Python. If it has a torch >= 2.6, that one is used; TORCH_INDEX=URL installs
# the pinned one from there instead.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Modules are compiled when they are first imported, and most never are: a third of the time of an installation.
export PIP_COMPILE := 0

SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

# Asked in words that every Python understands.
NEW_ENOUGH = @$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
    { echo "fused-rin: PYTHON must be Python 3.10 or newer, got '$(PYTHON)'" >&2; exit 1; }

.PHONY: all setup demo test lint fuzz sanitize bench-cpu bench-crowd bench-leaky bench-checkpoint bench-chunks bench-deep bench-where bench-peers bench-compare compat docs wheel gpu cuda-all test-triton clean
all: setup

# The build tools go into the environment first, so that the build needs no isolated one with a torch of its own.
BUILD_TOOLS := "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24" ninja
$(VENV)/.deps: pyproject.toml constraints.txt tools/environment.py
	$(NEW_ENOUGH)
	$(PYTHON) tools/environment.py $(VENV) $(TORCH_INDEX)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $(BUILD_TOOLS)
	$(BIN)/python -c "import tomllib" 2>/dev/null || $(BIN)/python -m pip install -q tomli
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $$($(BIN)/python tools/extras.py experiments bench test lint docs)
	# Triton's interpreter and compiler need no GPU; it has wheels for Linux only. A CPU build of torch does not ask for it.
	test "$$(uname)" != Linux || $(BIN)/python -c "import triton" 2>/dev/null || \
	    $(BIN)/python -m pip install -q --no-deps -c $(VENV)/constraints.txt triton
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	FUSED_RIN_BUILD_DIR=build/cmake $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@$(BIN)/python tools/cuda_toolkit.py >/dev/null  # its warning: pip shows none of a build that succeeds
	touch $@

setup: $(VENV)/.built

demo: setup
	$(BIN)/python -m fused_rin.experiments demo --out demo

# A process per core; tests of a group share what they have built (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.deps
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/*.cpp')
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml

SECONDS ?= 600
SEED ?= 0
fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) $(if $(RESULTS),--out $(RESULTS))

# Of each compiler that is there (SANITIZE="--compilers clang++ --sanitizers thread" for one), under build/sanitize.
sanitize: $(VENV)/.deps
	$(BIN)/python -m tools.sanitize $(SANITIZE)

bench-cpu: setup
	$(BIN)/python -m pytest benchmarks/test_cpu.py --benchmark-enable --benchmark-disable-gc --benchmark-max-time=0.25 \
	    --benchmark-min-rounds=5 --benchmark-warmup=on --benchmark-warmup-iterations=2 \
	    --benchmark-json=build/bench-cpu.json --benchmark-quiet -q
	$(BIN)/python -m benchmarks.table build/bench-cpu.json $(or $(RESULTS),benchmarks/results/cpu.json)

bench-crowd: setup
	$(BIN)/python -m benchmarks.crowd $(RESULTS)

# Where the time of a layer's calls goes, by Linux's perf; after bench-peers.
bench-where: setup
	$(BIN)/python -m benchmarks.where $(RESULTS)

bench-checkpoint: setup
	$(BIN)/python -m benchmarks.checkpoint $(RESULTS)

bench-deep: setup
	$(BIN)/python -m benchmarks.deep $(RESULTS)

bench-chunks: setup
	$(BIN)/python -m benchmarks.chunks $(RESULTS)

bench-leaky: setup
	$(BIN)/python -m benchmarks.leaky $(RESULTS)

# Other engines in an environment of their own, each where it can be had. ONLY='training-B1-*', QUICK=1: fewer cases. PASSES=1.
PEERS := build/peers
$(PEERS)/.deps: pyproject.toml constraints.txt tools/environment.py benchmarks/peers/install.py
	$(NEW_ENOUGH)
	$(PYTHON) tools/environment.py $(PEERS) $(TORCH_INDEX)
	$(PEERS)/bin/python -c "import tomllib" 2>/dev/null || $(PEERS)/bin/python -m pip install -q tomli
	$(PEERS)/bin/python -m pip install -q -c $(PEERS)/constraints.txt $$($(PEERS)/bin/python tools/extras.py experiments bench)
	$(PEERS)/bin/python benchmarks/peers/install.py $(PEERS)/constraints.txt $(PEERS)/missing.json \
	    $$($(PEERS)/bin/python tools/extras.py peers)
	touch $@

bench-peers: setup $(PEERS)/.deps
	PYTHONPATH=python $(PEERS)/bin/python -m fused_rin bench --out $(or $(RESULTS),benchmarks/results/peers.json) \
	    $(if $(ONLY),--only '$(ONLY)') $(if $(QUICK),--quick) --passes $(or $(PASSES),2)

# OLD=a.json NEW=b.json, of bench-peers or bench-cpu: what got slower beyond the noise of both; fails if anything did.
bench-compare: setup
	$(BIN)/python -m fused_rin bench --compare $(OLD) $(NEW)

# An environment of its own: these packages bring some hundred others, about 2 GB.
COMPAT := build/compat
$(COMPAT)/.deps: pyproject.toml constraints.txt tools/environment.py
	$(NEW_ENOUGH)
	$(PYTHON) tools/environment.py $(COMPAT) $(TORCH_INDEX)
	$(COMPAT)/bin/python -m pip install -q -c $(COMPAT)/constraints.txt $(BUILD_TOOLS)
	$(COMPAT)/bin/python -c "import tomllib" 2>/dev/null || $(COMPAT)/bin/python -m pip install -q tomli
	$(COMPAT)/bin/python -m pip install -q -c $(COMPAT)/constraints.txt $$($(COMPAT)/bin/python tools/extras.py real-models rl experiments)
	touch $@

compat: $(COMPAT)/.deps
	FUSED_RIN_CUDA=off FUSED_RIN_BUILD_DIR=build/cmake-compat $(COMPAT)/bin/python -m pip install -q --no-build-isolation --no-deps .
	$(COMPAT)/bin/python -m pytest compat tests/test_rl.py tests/examples -rs

# The variable silences a notice about the theme's next years, which is no warning about a page.
docs: $(VENV)/.deps
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# PYTHONS="3.11 3.12" and TORCHS="2.10.0+cpu 2.13.0+cpu": for which Pythons, and with which torch they are tried.
# In environments of its own, under build/wheel.
wheel:
	$(PYTHON) -m tools.wheel $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TORCHS),--torch $(TORCHS))

# On a machine with a GPU, with the Python that has its torch, five minutes each: PART=1 build, CUDA tests, steps, benchmark,
# table, plot; PART=2 all Triton tests, sanitizer, training loop.
PART ?= 1
gpu:
	$(PYTHON) -m benchmarks.gpu.run $(RESULTS) --part $(PART)

# The CUDA kernels on all six architectures: the committed table of registers, and the build's time and size.
cuda-all: setup
	$(BIN)/python -m tools.cuda_build all

# The CUDA kernels of grids of 64 and 128 CTAs on CPU fibres, six minutes; `make test` has those of 32.
cuda-large: setup
	$(BIN)/python -m pytest tests/cuda_on_cpu/large_grids.py

# The Triton kernels' tests with another release, e.g. TRITON=3.6.0, the oldest that is supported. Its interpreter makes
# an int of an array with one element, which NumPy 2.5 refuses.
TRITON ?= 3.6.0
test-triton: setup
	test -d build/triton-$(TRITON) || $(BIN)/python -m pip install -q --no-deps --target build/triton-$(TRITON) \
	    triton==$(TRITON) "numpy<2.4"
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON)'"
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest tests/triton_kernels tests/triton_aot

clean:
	rm -rf build demo dist $(VENV) *.egg-info python/*.egg-info python/fused_rin/*.so
