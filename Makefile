# The environment is .venv, created with PYTHON and pinned by constraints.txt. Stamp files in it mark
# finished steps, so that a target repeats only the steps whose inputs changed.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.environment
BUILD := .venv/.build$(PYFUSED_ISAS:%=-%)
TOOLS := .venv/.tools
TRITON_STAMP := .venv/.triton
EXTRAS := .venv/.extras
WHEEL_TOOLS := .venv/.wheels
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
export CXX  # build with the compiler that was checked
unexport PYTHONDONTWRITEBYTECODE  # else every process recompiles torch's Python files

.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-quick test test-interpreter test-full test-repo test-torch test-machines test-integrations gpu-compile gpu-check \
	bench bench-quick bench-steps bench-threads bench-busy bench-compare bench-sweep sizes formulas docs lint sanitize sanitize-memory wheels test-wheel \
	test-aarch64 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

setup: $(TOOLS) ## create the development environment in .venv (PYTHON=python3.12 selects another Python)

build: $(BUILD) ## compile the kernels (CXX=g++-13 selects a compiler, PYFUSED_ISAS=all compiles for every instruction set)

demo: $(BUILD) ## train with torch's losses and with pyfused's, compare and plot: six minutes on two cores
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/losses.py
	$(BIN)/python examples/gradient_descent.py
	$(BIN)/python examples/custom_loss.py
	$(BIN)/python examples/recommender.py
	$(BIN)/python examples/heads.py
	$(BIN)/python examples/grpo.py
	$(BIN)/python examples/distillation.py

demo-quick: $(BUILD) ## demo with fewer steps: under 3 minutes on two cores
	$(BIN)/python examples/demo.py --quick
	$(BIN)/python examples/losses.py --quick
	$(BIN)/python examples/gradient_descent.py
	$(BIN)/python examples/custom_loss.py
	$(BIN)/python examples/heads.py

formulas: $(if $(and $(OP),$(wildcard $(BUILD))),,$(BUILD)) $(TOOLS) ## generate C++ from the declarations, and rebuild (OP=mse_loss: try one formula, 1 minute)
ifdef OP # for the oldest instruction set, which compiles in a third of the time of the newest
	$(BIN)/python tools/formulas.py csrc
	PYFUSED_ISAS=$(OLDEST) $(BIN)/python setup.py --quiet build_ext --inplace
	PYFUSED_CPU_CAPABILITY=$(OLDEST) $(BIN)/python -m pytest -n 0 -p no:randomly $(FORMULA_TESTS) -k "$(OP)"
else
	$(BIN)/python tools/formulas.py
	$(MAKE) build
endif

OLDEST = $(if $(filter x86_64,$(shell uname -m)),x86-64-v2,generic)
FORMULA_TESTS = $(addprefix tests/contract/test_,accuracy.py values.py options.py) \
	tests/ops/test_pointwise_loss.py tests/ops/test_activation.py

INTERPRETED = TRITON_INTERPRET=1 PYFUSED_BACKEND=triton $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)
SELECTED = $(filter -k% -m% tests/%,$(PYTEST_ARGS))

test: $(BUILD) $(TOOLS) $(if $(SELECTED),,$(TRITON_STAMP)) ## run the tests of the library: 7 to 10 minutes on two cores (PYTEST_ARGS="-k relu" selects some, on CPUs)
	$(BIN)/python -m pytest -qx -n 0 -p no:randomly tests/contract/test_completeness.py
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/repo $(PYTEST_ARGS)
	$(if $(SELECTED),,$(INTERPRETED))

test-interpreter: $(BUILD) $(TOOLS) $(TRITON_STAMP) ## run the tests of the GPU kernels, in Triton's interpreter (PYTEST_ARGS="-k relu")
	$(INTERPRETED)

# Another version of torch is installed with its Triton into a folder that comes first on PYTHONPATH.
test-torch: $(BUILD) $(TOOLS) .venv/torch-$(TORCH) ## run the tests with another version of torch (TORCH=2.11.0)
	PYTHONPATH=.venv/torch-$(TORCH) $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

.venv/torch-: # TORCH is not set
	@echo 'test-torch needs a version: make test-torch TORCH=2.11.0'; exit 1

.venv/torch-%: | $(ENVIRONMENT)
	@echo 'Installing torch $* into $@: minutes and up to 5 GB, once'
	@$(PIP) install --no-compile --target $@ torch==$*

test-machines: $(BUILD) $(TOOLS) ## run tests with the code paths that libraries use on other processors (15 minutes)
	$(BIN)/python tests/machines.py $(PYTEST_ARGS)

test-full: override PYTEST_ARGS += --full
test-full: test ## run all tests, with every combination of parameters

test-repo: $(BUILD) $(EXTRAS) $(TRITON_STAMP) ## run the tests of pages, examples, packages and tools
	$(BIN)/python -m pytest -n 2 --dist loadfile --slow tests/repo $(PYTEST_ARGS)

# Other versions of Triton are installed into separate folders, which come first on PYTHONPATH.
SUPPORTED = $(shell sed -n 's/^    "\([0-9.]*\)": .*/\1/p' pyfused/backends/versions.py)
TRITONS = $(if $(filter all,$(TRITON)),$(SUPPORTED),$(TRITON))

gpu-compile: $(BUILD) $(TOOLS) $(TRITON_STAMP) $(TRITONS:%=.venv/triton-%) ## compile the GPU kernels, without a GPU (TRITON=3.6.0 or all)
	for version in $(or $(TRITONS),installed); do PYTHONPATH=.venv/triton-$$version PYFUSED_TEST_COMPILE=all \
		$(BIN)/python -m pytest -n auto --slow tests/gpu/test_compile_ahead.py $(AHEAD_ARGS) || exit 1; done

.venv/triton-%: | $(ENVIRONMENT)
	@$(PIP) install --no-deps --target $@ triton==$*

gpu-check: ## test and time the kernels on this machine's GPU, with the packages of PYTHON (OUT=folder)
	@$(PYTHON) benchmarks/run.py gpu-check $(or $(OUT),$(error gpu-check needs OUT=folder))

test-integrations: $(BUILD) $(EXTRAS) ## run the tests with transformers, TRL, Lightning, skorch and Liger
	$(BIN)/pytest -n 2 --dist worksteal -m integrations tests/adopt/test_integrations.py tests/adopt/test_trl.py $(PYTEST_ARGS)  # with python -m, transformers would import the folder kernels/

bench: $(BUILD) $(TOOLS) ## compare torch and pyfused, and write benchmarks/results/ (1 to 2 hours; THREADS=16)
	$(BIN)/python benchmarks/run.py report $(THREADS:%=--threads %)

bench-quick: $(BUILD) $(TOOLS) ## time the headline cases (BENCH_ARGS="-k relu" selects others); writes .benchmarks/
	$(BIN)/python benchmarks/run.py quick $(BENCH_ARGS)

bench-steps: $(BUILD) $(TOOLS) ## time training steps of eight models and the demo's, and update README.md and docs/ (15 minutes; with BENCH_ARGS, only time)
	$(BIN)/python benchmarks/run.py steps $(BENCH_ARGS)
	$(if $(BENCH_ARGS),,$(BIN)/python docs/curves.py && $(BIN)/python docs/gallery.py)

bench-threads: $(BUILD) $(TOOLS) ## time calls and training steps with 1, 2, 4, ... threads of this machine (3 minutes)
	$(BIN)/python benchmarks/run.py threads

bench-busy: $(BUILD) $(TOOLS) ## time the headline cases under load: medians and 90th percentiles (5 minutes)
	$(BIN)/python benchmarks/run.py busy

bench-compare: $(BUILD) $(TOOLS) ## find kernels that are slower than at another revision: make bench-compare BASE=main~3 (5 minutes after its build)
	@test "$(BASE)" || { echo "bench-compare needs a revision: make bench-compare BASE=main~3"; exit 1; }
	$(BIN)/python benchmarks/run.py compare $(BASE) $(COMPARE_ARGS)

sizes: $(TOOLS) ## write csrc/sizes.txt: the bytes of machine code of each kernel
	PYFUSED_ISAS=all $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python tools/sizes.py

bench-sweep: $(BUILD) $(TOOLS) ## time calls of random shapes, and list those that are slower than in torch (20 minutes)
	$(BIN)/python benchmarks/run.py sweep $(SWEEP_ARGS)

docs: $(BUILD) $(EXTRAS) ## build the documentation in site/, and check its spelling; test-repo checks its links and code (1 minute)
	$(BIN)/codespell *.md docs csrc pyfused kernels benchmarks examples tests tools
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs site

lint: $(TOOLS) ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp tests/kernels/*.cpp
	printf '%s\n' csrc/*.cpp | xargs -P 2 -I{} $(BIN)/clang-tidy --quiet {} -- $(TIDY_FLAGS)

TIDY_FLAGS = -std=c++17 $(if $(filter x86_64,$(shell uname -m)),-mavx2 -mfma -mf16c) \
	$$($(BIN)/python -m pybind11 --includes)

# Python is not instrumented, so the sanitizer's library is preloaded. libgomp is not either, so races
# are checked in a program without it. The tests of accuracy, contract and autograd are omitted because
# they take minutes and call the same code; the tests of memory and processes, because sanitizers
# change memory use. One test of accuracy is deselected, because its sums are not vectorised.
SANITIZE := build/sanitize
SANITIZED = cd $(SANITIZE)/lib && $(if $(PYFUSED_ISAS),PYFUSED_CPU_CAPABILITY=$(subst _,-,$(PYFUSED_ISAS))) \
	LD_PRELOAD="$(call library,asan) $(call library,stdc++)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python
library = $$($(CXX) -print-file-name=lib$(1).so)
CHECKED = recycle cross_entropy margin linear_cross_entropy log_probs distillation embedding_loss softmax pointwise_loss activation formula threads errors large vec
AFTER_FREE = import torch; from pyfused.backends import cpu; x = torch.ones(9 << 20); \
	address = cpu.empty(x.shape, x.dtype, x).data_ptr(); \
	cpu.native.relu(0, 9 << 20, address, x.data_ptr(), (0.0, 0.0, 0.0), 1, ())
OVERRUN = import torch; from pyfused.backends import cpu; x = torch.zeros(5); \
	cpu.native.relu(0, 6, x.data_ptr(), x.data_ptr(), (0.0, 0.0, 0.0), 1, ())

# Runs a program whose error the sanitizer must report; another error is shown.
must_report = if ($(SANITIZED) -c '$($(1))') >$(SANITIZE)/report 2>&1; then \
	echo 'The sanitizer missed $(3)'; exit 1; fi; \
	grep -q $(2) $(SANITIZE)/report || { cat $(SANITIZE)/report; exit 1; }

sanitize-memory: export CXXFLAGS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=all
sanitize-memory: $(TOOLS) ## find memory errors and undefined behaviour in the kernels (GCC; PYFUSED_ISAS=x86_64_v2 takes a third of the time)
	$(BIN)/python setup.py --quiet build --build-base $(SANITIZE)/temp --build-lib $(SANITIZE)/lib
	@$(call must_report,OVERRUN,heap-buffer-overflow,an overrun: the kernels are not instrumented)
	@$(call must_report,AFTER_FREE,use-after-poison,a use after free: free blocks are not poisoned)
	$(SANITIZED) -m pytest -n 2 --dist loadfile $(wildcard $(CHECKED:%=$(CURDIR)/tests/*/test_%.py)) \
		--deselect tests/ops/test_softmax.py::test_as_accurate_as_torch $(PYTEST_ARGS)

sanitize: sanitize-memory ## also find races between threads (5 minutes)
	cd $(SANITIZE) && $(CXX) -std=c++17 -O1 -g -fopenmp-simd -fsanitize=thread -I$(CURDIR)/csrc \
		-c $(CURDIR)/tests/kernels/threads.cpp $(filter-out %/bindings.cpp,$(wildcard $(CURDIR)/csrc/*.cpp))
	$(CXX) -fsanitize=thread -rdynamic $(SANITIZE)/*.o -ldl -lpthread -o $(SANITIZE)/threads
	TSAN_OPTIONS=halt_on_error=1 $(SANITIZE)/threads

DIST := dist
wheels: $(WHEEL_TOOLS) ## build the wheels of all platforms and the source distribution in dist/ (ONLY="cp311-*" selects some; Python 3.11)
	$(BIN)/python tools/wheels.py build --dist $(DIST) $(if $(ONLY),--only "$(ONLY)")

test-wheel: ## test a wheel with only torch installed, without a compiler (WHEEL=file, PYTHON=python3.12, TORCH=torch==2.13.0)
	@$(BIN)/python tools/wheels.py test --python $(PYTHON) $(if $(TORCH),--torch $(TORCH)) \
		$(or $(WHEEL),$(error test-wheel needs WHEEL=file))

test-aarch64: $(WHEEL_TOOLS) ## test the ARM64 wheel under qemu (Debian's qemu-user and mmdebstrap)
	$(BIN)/python tools/wheels.py build --only cp311-manylinux_aarch64
	$(BIN)/python tools/aarch64.py

clean: ## remove build outputs and caches, except .venv
	rm -rf build dist demo site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info pyfused/*.so $(BUILD)
	find pyfused kernels tests examples benchmarks -name __pycache__ -exec rm -rf {} +

# Missing requirements are reported in one line, before anything is downloaded.
$(ENVIRONMENT): constraints.txt
	@command -v $(PYTHON) >/dev/null $(call need,Python 3.10 or later: $(PYTHON) not found. Set PYTHON to use another Python)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		$(call need,Python 3.10 or later: $(PYTHON) is $$($(PYTHON) --version 2>&1))
	@command -v $(firstword $(CXX)) >/dev/null $(call need,a C++17 compiler: $(CXX) not found. Set CXX to use another compiler)
	@echo '#include <string_view>' | $(COMPILE) \
		$(call need,a C++17 compiler: $(CXX) is $$($(CXX) --version | head -n 1))
	@echo '#include <Python.h>' | $(COMPILE) -I$(HEADERS) \
		$(call need,the headers of Python: Python.h not found in $(HEADERS))
	@echo 'Installing torch and the packages of the demo into .venv: a minute or two, once'
	@$(PYTHON) -m venv .venv
	@$(PIP) install --no-compile --requirement constraints.txt  # modules are compiled when they are imported
	@touch $@

# Packages that the demo does not need are installed when a target needs them.
$(TOOLS): $(ENVIRONMENT) constraints-dev.txt
	@echo 'Installing the packages of tests, benchmarks and lint into .venv: a minute or two, once'
	@$(PIP) install --no-compile --requirement constraints-dev.txt --constraint constraints.txt
	@touch $@

$(TRITON_STAMP): $(TOOLS) constraints-triton.txt
	@echo 'Installing Triton into .venv: 0.7 GB, once'
	@$(PIP) install --no-compile --requirement constraints-triton.txt
	@touch $@

$(EXTRAS): $(TOOLS) constraints-extras.txt
	@echo 'Installing the packages of documentation and integrations into .venv: minutes, once'
	@$(PIP) install --no-compile --requirement constraints-extras.txt \
		--constraint constraints-triton.txt --constraint constraints-dev.txt --constraint constraints.txt
	@touch $@

$(WHEEL_TOOLS): $(TOOLS) constraints-wheels.txt
	@echo 'Installing the packages for building wheels into .venv: a minute, once'
	@$(PIP) install --no-compile --requirement constraints-wheels.txt \
		--constraint constraints-dev.txt --constraint constraints.txt
	@touch $@

need = || { echo "pyfused needs $(1)"; exit 1; }
COMPILE = $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null
HEADERS = $$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')

$(BUILD): $(ENVIRONMENT) setup.py pyproject.toml tools/editable/pyfused/__init__.py $(wildcard csrc/*.h csrc/*.inc csrc/*.cpp)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@echo '$(CURDIR)/tools/editable' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyfused.pth"
	@$(BIN)/python -m pyfused
	@touch $@
