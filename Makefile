# The environment is .venv, created with PYTHON and pinned by constraints.txt. Stamp files in it mark
# finished steps, so that a target repeats only the steps whose inputs changed.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := .venv/.environment
BUILD := .venv/.build$(PYFUSED_ISAS:%=-%)
TOOLS := .venv/.tools
EXTRAS := .venv/.extras
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
export CXX  # build with the compiler that was checked
unexport PYTHONDONTWRITEBYTECODE  # else every process recompiles torch's Python files

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-repo lint formulas docs bench sanitize gpu-compile gpu-check wheels clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(TOOLS) ## create the development environment in .venv (PYTHON=python3.12 selects another Python)

build: $(BUILD) ## compile the kernels (CXX=g++-13 selects a compiler, PYFUSED_ISAS=all compiles for every instruction set)

demo: $(BUILD) ## train with torch's losses and with pyfused's, compare and plot: six minutes on two cores (QUICK=1: three)
	@echo 'Loading torch, scikit-learn and matplotlib: half a minute the first time'
	$(BIN)/python examples/demo.py $(QUICK:%=--quick)
	$(BIN)/python examples/losses.py $(QUICK:%=--quick)
	$(BIN)/python examples/gradient_descent.py
	$(BIN)/python examples/custom_loss.py
	$(BIN)/python examples/heads.py $(QUICK:%=--rounds 1)
ifndef QUICK
	$(BIN)/python examples/recommender.py
	$(BIN)/python examples/grpo.py
	$(BIN)/python examples/distillation.py
endif

test: $(BUILD) $(TOOLS) ## run the tests of the library: 5 to 10 minutes on two cores (PYTEST_ARGS="-k relu" selects some, on CPUs)
	$(BIN)/python -m pytest -qx -n 0 -p no:randomly tests/contract/test_completeness.py
ifneq ($(filter -k% -m% tests/%,$(PYTEST_ARGS)),)
	$(PYTEST) --ignore tests/repo $(PYTEST_ARGS)
else  # both suites run, whatever the first reports
	@cpu=passed gpu=passed; \
	$(PYTEST) --ignore tests/repo $(PYTEST_ARGS) || cpu=failed; \
	TRITON_INTERPRET=1 PYFUSED_BACKEND=triton $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS) || gpu=failed; \
	echo "Tests on CPUs $$cpu; tests of GPU kernels in Triton's interpreter $$gpu"; \
	test "$$cpu $$gpu" = 'passed passed'
endif

test-repo: $(BUILD) $(EXTRAS) ## run the tests of pages, examples, packages and tools
	$(PYTEST) --slow tests/repo $(PYTEST_ARGS)

lint: $(TOOLS) ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp tests/kernels/*.cpp
	printf '%s\n' csrc/*.cpp | xargs -P 2 -I{} $(BIN)/clang-tidy --quiet {} -- $(TIDY_FLAGS)

TIDY_FLAGS = -std=c++17 $(if $(filter x86_64,$(shell uname -m)),-mavx2 -mfma -mf16c) \
	$$($(BIN)/python -m pybind11 --includes)

formulas: $(if $(and $(OP),$(wildcard $(BUILD))),,$(BUILD)) $(TOOLS) ## generate C++ from the declarations, and rebuild (OP=mse_loss: try one formula, 1 minute)
ifdef OP # for the oldest instruction set, which compiles in a third of the time of the newest
	$(BIN)/python tools/formulas.py
	PYFUSED_ISAS=$(OLDEST) $(BIN)/python setup.py --quiet build_ext --inplace
	PYFUSED_CPU_CAPABILITY=$(OLDEST) $(BIN)/python -m pytest -n 0 -p no:randomly $(FORMULA_TESTS) -k "$(OP)"
else
	$(BIN)/python tools/formulas.py
	$(MAKE) build
endif

OLDEST = $(if $(filter x86_64,$(shell uname -m)),x86-64-v2,generic)
FORMULA_TESTS = tests/contract/test_accuracy.py tests/contract/test_values.py tests/contract/test_options.py \
	tests/ops/test_pointwise_loss.py tests/ops/test_activation.py

docs: $(BUILD) $(EXTRAS) ## build the documentation in site/, and check its spelling; test-repo checks its links and code (1 minute)
	$(BIN)/codespell *.md docs csrc pyfused kernels benchmarks examples tests tools
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs site

bench: $(BUILD) $(TOOLS) ## compare torch and pyfused: 1 to 2 hours (BENCH_ARGS="report --quick -k relu" runs another command of benchmarks/run.py)
	$(BIN)/python benchmarks/run.py $(or $(BENCH_ARGS),report)

# Python is not instrumented, so the sanitizer's library is preloaded. libgomp is not either, so races
# are found with another runtime, and without MKL's products. The tests of accuracy, values and autograd
# are omitted otherwise, because they take minutes and call the same code; the tests of memory and
# processes, because sanitizers change memory use. One test of accuracy is deselected, because its sums
# are not vectorised.
SANITIZE := build/sanitize
SANITIZERS := address,undefined
CHECKED = tests/ops tests/formula tests/contract/test_errors.py tests/kernels/test_large.py tests/kernels/test_recycle.py \
	tests/kernels/test_threads.py tests/kernels/test_vec.py
library = $$($(CXX) -print-file-name=lib$(1).so)

sanitize: $(TOOLS) ## find memory errors, undefined behaviour and races in the kernels (GCC; PYFUSED_ISAS=x86_64_v2 takes a third of the time)
	CXXFLAGS='-O1 -g1 -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=all' \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZE)/temp --build-lib $(SANITIZE)/lib
	cd $(SANITIZE)/lib && $(if $(PYFUSED_ISAS),PYFUSED_CPU_CAPABILITY=$(subst _,-,$(PYFUSED_ISAS))) \
		LD_PRELOAD="$(call library,asan) $(call library,stdc++)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(CURDIR)/$(PYTEST) \
		$(CHECKED:%=$(CURDIR)/%) --deselect tests/ops/test_softmax.py::test_as_accurate_as_torch $(PYTEST_ARGS)
	CXXFLAGS='-O1 -g1 -fsanitize=thread' PYFUSED_ISAS=$(OLDEST) \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZE)/races --build-lib $(SANITIZE)/races/lib
	$(CXX) -O1 -g -fsanitize=thread -shared -fPIC tests/kernels/openmp.cpp -o $(SANITIZE)/races/openmp.so
	cd $(SANITIZE)/races/lib && PYFUSED_CPU_CAPABILITY=$(OLDEST) TSAN_OPTIONS=halt_on_error=1 \
		LD_PRELOAD="$(call library,tsan) $(call library,stdc++) ../openmp.so" $(CURDIR)/$(PYTEST) -n 0 -s \
		$(CURDIR)/tests/contract/test_values.py $(CURDIR)/tests/contract/test_autograd.py \
		-k '(every_number_of_threads or concurrent_python_threads) and not linear'

# Other versions of Triton are installed into separate folders, which come first on PYTHONPATH.
gpu-compile: $(BUILD) $(TOOLS) $(TRITON:%=.venv/triton-%) ## compile the GPU kernels, without a GPU (TRITON="3.6.0 3.9.0" selects versions)
	for version in $(or $(TRITON),installed); do PYTHONPATH=.venv/triton-$$version PYFUSED_TEST_COMPILE=all \
		$(BIN)/python -m pytest -n auto --slow tests/gpu/test_compile_ahead.py $(PYTEST_ARGS) || exit 1; done

.venv/triton-%: | $(ENVIRONMENT)
	@$(PIP) install --no-deps --target $@ triton==$*

gpu-check: ## test and time the kernels on this machine's GPU, with the packages of PYTHON (OUT=folder)
	@$(PYTHON) benchmarks/run.py gpu-check $(or $(OUT),$(error gpu-check needs OUT=folder))

# The wheel is linked from the objects that `build` has compiled.
wheels: $(BUILD) $(TOOLS) ## build the source distribution, and the wheel for this Python, platform and all instruction sets, in dist/
	rm -rf dist build/lib*
	$(BIN)/python -m build --sdist
	PYFUSED_ISAS=all $(BIN)/python setup.py --quiet build_ext --build-temp $(OBJECTS) bdist_wheel

OBJECTS = build/editable-$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_python_version())')

clean: ## remove build outputs and caches, except .venv
	rm -rf build dist demo site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info pyfused/*.so $(BUILD)
	find pyfused kernels tests examples benchmarks -name __pycache__ -exec rm -rf {} +

# Missing requirements are reported in one line, before anything is downloaded.
$(ENVIRONMENT): constraints.txt
	@echo 'Installing torch and the packages of the demo into .venv: a minute or two, once'
	@$(PYTHON) -m venv .venv
	@$(PIP) install --no-compile --constraint constraints.txt pybind11 setuptools
	@$(call install,examples)
	@echo '$(CURDIR)/tools/editable' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pyfused.pth"
	@touch $@

# Packages that the demo does not need are installed when a target needs them.
$(TOOLS): $(ENVIRONMENT)
	@echo 'Installing the packages of tests, benchmarks and lint into .venv: minutes and 1 GB, once'
	@$(call install,dev)
	@touch $@

$(EXTRAS): $(TOOLS)
	@echo 'Installing the packages of documentation and integrations into .venv: minutes, once'
	@$(call install,docs$(COMMA)integrations)
	@touch $@

# Installs an extra of pyproject.toml, and the source folder, whose kernels `build` compiles.
install = PYFUSED_NO_EXTENSION=1 $(PIP) install --no-compile \
	--no-build-isolation --constraint constraints.txt --editable '.[$(1)]'
COMMA := ,
need = || { echo "pyfused needs $(1)"; exit 1; }
COMPILE = $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null
HEADERS = $$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')

$(BUILD): $(ENVIRONMENT) setup.py tools/editable/pyfused/__init__.py $(wildcard csrc/*.h csrc/*.inc csrc/*.cpp)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -m pyfused
	@touch $@
