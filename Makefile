# Every target makes the environment that it needs. Wanted on the machine: Python 3.10 or newer with venv, git, g++, make.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
EDITABLE := TORCH_PAGED_NO_EXT=1 $(PIP) install --no-build-isolation -e
WHEEL_VENV := .venv-wheel
TPU_XLA_VENV := .venv-tpu-xla
TPU_VENV := .venv-tpu
WITHOUT_TPU := JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled
TPU_XLA := $(WITHOUT_TPU) PJRT_DEVICE=CPU $(TPU_XLA_VENV)/bin/python -m pytest
# torch_xla keeps 2048 programs unless told: after some 300 the process has no memory mappings left and is aborted.
XLA_CASES := XLA_COMPILATION_CACHE_SIZE=16 TORCH_PAGED_TEST_DEVICE=xla $(TPU_XLA) \
  -W ignore::DeprecationWarning -W ignore::UserWarning
THROUGH_XLA := tests/test_tpu_xla.py tests/test_tpu_xla_transformers.py
# Nearly all the time goes into compiling interpreted kernels, each of which runs once; level 0 orders sums by place.
QUICKLY := XLA_FLAGS=--xla_backend_optimization_level=1
SOME_CASES := plain or sinks or alibi or soft_cap or shuffled or window_7 or chunk_5 or scales_4 or padd or no_keys or inputs
# torch_tpu warns when torch loads it, which tests take for an error: they load it in processes of their own. Interpreted
# programs are kept, since most of the hours go into compiling them: a run that was cut short goes on where it ended.
KEPT := JAX_COMPILATION_CACHE_DIR=build/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
TPU := TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(WITHOUT_TPU) $(KEPT) $(TPU_VENV)/bin/python -m pytest
# One of each minor version, 2.9.0 first: the oldest that the library must load in.
TORCHES ?= 2.9.0 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
# What depends on torch: the registration, the dispatcher, the compiler, the ops, exceptions and signals.
WITH_TORCH = $(OPS:%=tests/test_%.py) $(patsubst %,tests/test_%.py,schema autograd fake dispatch bad_input compile \
  semantics determinism faults_signals faults_threads faults_memory faults_values fuzz zero_sizes cache_layouts)
TRANSFORMERS ?= 5.23.0 5.6.0 4.57.6
SMALL_OPS := reshape_and_cache quantize_and_cache copy_blocks gather_cache merge_attention_states
OPS := paged_attention flash_attn_varlen $(SMALL_OPS)
CONFORMANCE := $(OPS:%=tests/test_%.py) $(patsubst %,tests/test_%.py,semantics scenarios hidden_keys combinations \
  attention_properties determinism) tests/test_masks.py::test_through_the_op
# Cases that run on a simulated TPU too: rings of buffers, empty sequences, all that is copied beside the pages.
SIMULATED := tests/test_tpu_interpret.py tests/test_paged_attention.py tests/test_flash_attn_varlen.py -k "tpu_interpret or \
  odd_lengths or (plain and bfloat16) or (mask_heads and not group) or int8_scales_4 or window_17_ or shuffled or padding_rows"
# NKI's kernels on the simulator of tests/nki_sim, for a generation and the cores that share a kernel.
NKI = TORCH_PAGED_NKI_SIM=1 NEURON_PLATFORM_TARGET_OVERRIDE=$(1) NEURON_LOGICAL_NC_CONFIG=$(2) $(BIN)/python -m pytest
CROSS ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
GENERIC := $(filter-out %_avx2.cpp %_avx512.cpp,$(wildcard csrc_shims/cpu/*.cpp))
KERNELS := $(wildcard csrc_shims/*.cpp csrc_shims/*.h csrc_shims/cpu/*.cpp csrc_shims/cpu/*.h)
LIBRARY := torch_paged/_C.abi3.so
# The tests that reach the C++ kernels: not those of other backends and their simulators, of the build, of measurements,
# nor those that watch the process's memory or bring an allocator of their own.
SANITIZED := $(filter-out $(addprefix tests/test_,tpu_% neuron_% nki_sim_% old_neuron_% packaging.py benchmarks.py \
  instructions.py faults_leaks.py faults_memory.py),$(wildcard tests/test_*.py))
# Kernels that are several times slower answer later.
UNTIMED := --deselect tests/test_faults_signals.py::test_ctrl_c_ends_a_prefill
ASAN := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
ASAN_RUN = LD_PRELOAD="$(foreach name,asan ubsan,$$(g++ -print-file-name=lib$(name).so))" \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64:allocator_may_return_null=1
FUZZ_SECONDS ?= 600
LOCK_VENV := .venv-lock

.PRECIOUS: .venv-transformers-%/.ready
.PHONY: demo test test-transformers test-tpu test-tpu-xla test-tpu-device lint bench bench-tpu tpu-matrix mutants-tpu
.PHONY: test-neuron test-neuron-device bench-neuron mutants-neuron
.PHONY: instructions wheel clean mutants test-wheel test-reproducible-wheel test-torches test-aarch64 lock help
.PHONY: asan tsan fuzz fuzz-kernels leaks storm storm-allocator storm-requests
.DELETE_ON_ERROR:

help:
	@echo "make demo               generate text with a small model through torch.ops.paged"
	@echo "make test               run all tests"
	@echo "make test-transformers  every model and way to generate, on three versions of transformers"
	@echo "make test-tpu           the TPU's kernels, interpreted on every case, and compiled for its chips (hours)"
	@echo "make test-tpu-xla       the TPU's kernels through torch_xla, without a TPU (a download of 8 GB)"
	@echo "make test-tpu-device    the cases of the tests on the TPU of this machine"
	@echo "make test-neuron        the NKI kernels, simulated on every case for Trainium 2 and 3 (hours)"
	@echo "make test-neuron-device the cases of the tests on the NeuronCores of this machine"
	@echo "make lint               ruff, mypy, clang-format"
	@echo "make bench              measure the kernels beside peers and limits (ARGS=--quick: minutes)"
	@echo "make instructions       count the kernels' instructions and compare them with committed figures"
	@echo "make mutants            plant faults in the kernels and see the tests catch them"
	@echo "make asan               the C++ kernels and their binding under AddressSanitizer and UBSan, on the CPU's tests"
	@echo "make tsan               the kernels' threads under ThreadSanitizer"
	@echo "make fuzz-kernels       fuzz the kernels through the binding's checks (clang; FUZZ_SECONDS=600)"
	@echo "make fuzz               100 000 calls with corrupted arguments (ARGS=\"--count 1000 --seed 7\")"
	@echo "make storm              10^6 random operations on the block allocator, ten minutes of random requests"
	@echo "make leaks              call every op a million times and watch the memory"
	@echo "make tpu-matrix         compile the TPU kernels for every chip, dtype and shape, without a TPU"
	@echo "make bench-tpu          static estimates of the TPU kernels beside those of jax"
	@echo "make mutants-tpu        plant faults in the TPU kernels and see the tests catch them"
	@echo "make bench-neuron       the NKI kernels' cost by a model, beside its limits and other schemes"
	@echo "make mutants-neuron     plant faults in the NKI kernels and see the tests catch them"
	@echo "make wheel              build dist/*.whl"
	@echo "make test-wheel         install the wheel into a fresh environment and use it"
	@echo "make test-reproducible-wheel  build it once more, elsewhere, and compare the bytes"
	@echo "make test-torches       the same kernels with every minor version of torch (test-torch-2.9.0: one; GBs each)"
	@echo "make lock               write .ci/requirements.txt, what CI installs (ARGS=--upgrade: the newest of it)"
	@echo "make test-aarch64       cross-build the kernels and run their tests under qemu"
	@echo "make clean              remove what these targets made"

# Torch first: the build imports it. The package is linked without its kernels, which are built below, file by file.
# With a lock, as in CI, nothing is installed but the files whose hashes it names.
$(VENV)/.ready: pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCK
	$(PIP) install --only-binary :all: --require-hashes -r $(LOCK)
	$(EDITABLE) . --no-deps
else
	$(PIP) install "torch==$(TORCH)" "setuptools>=77" packaging
	$(EDITABLE) ".[test,transformers]"
endif
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(EDITABLE) ".[lint]"
	touch $@

$(VENV)/.bench: $(VENV)/.ready
	$(EDITABLE) ".[bench]"
	touch $@

$(LIBRARY): $(VENV)/.ready setup.py torch_paged/contract/schema.py $(KERNELS)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

demo: $(LIBRARY)
	$(BIN)/python examples/02_generate.py $(ARGS)

test: $(LIBRARY)
	$(BIN)/python -m pytest $(ARGS)

# One environment for each version of transformers; the kernels are those of $(VENV).
.venv-transformers-%/.ready: pyproject.toml
	test -x .venv-transformers-$*/bin/python || $(PYTHON) -m venv .venv-transformers-$*
	.venv-transformers-$*/bin/python -m pip -q install "torch==$(TORCH)" "transformers==$*" "setuptools>=77" packaging
	TORCH_PAGED_NO_EXT=1 .venv-transformers-$*/bin/python -m pip -q install --no-build-isolation -e \
	  ".[test,transformers,test-transformers]" "transformers==$*"
	touch $@

test-transformers-%: .venv-transformers-%/.ready $(LIBRARY)
	.venv-transformers-$*/bin/python -m pytest -m "transformers_matrix or not transformers_matrix" \
	  $(wildcard tests/test_transformers*.py) $(ARGS)

test-transformers: $(TRANSFORMERS:%=test-transformers-%)

$(TPU_VENV)/.ready: pyproject.toml
	test -x $(TPU_VENV)/bin/python || $(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip -q install "torch==$(TORCH)" "setuptools>=77" packaging
	TORCH_PAGED_NO_EXT=1 $(TPU_VENV)/bin/python -m pip -q install --no-build-isolation -e ".[test,tpu,transformers]"
	touch $@

# The kernels' own tests; cases with simulated memories; the shared tests on CPU tensors, interpreted. Left out of the
# shared ones are those that give an op a cache which this backend refuses, and those of programs without a kernel:
# compile, autograd, fake, cache_layouts (caches of few lanes, or strided).
test-tpu: $(TPU_VENV)/.ready $(LIBRARY)
	$(TPU) $(wildcard tests/test_tpu_*.py) tests/test_on_import.py $(ARGS)
	TORCH_PAGED_TPU_INTERPRET=on_wait,races $(TPU) $(SIMULATED) $(ARGS)
	TORCH_PAGED_TPU_INTERPRET=eager,races $(TPU) $(SIMULATED) $(ARGS)
	TORCH_PAGED_TPU_INTERPRET=1 TORCH_PAGED_DEBUG=1 $(TPU) tests/test_bad_input.py $(ARGS)
	TORCH_PAGED_TPU_INTERPRET=1 $(TPU) $(CONFORMANCE) $(ARGS)
	$(WITHOUT_TPU) $(TPU_VENV)/bin/python -m benchmarks.tpu_gate

# torch_xla wants an older torch and jax than the other tests; they read neither jax nor libtpu from the extra "test".
# Attention's shared cases, hours of compilations, are run in part: one for each option.
$(TPU_XLA_VENV)/.ready: pyproject.toml
	test -x $(TPU_XLA_VENV)/bin/python || $(PYTHON) -m venv $(TPU_XLA_VENV)
	$(TPU_XLA_VENV)/bin/python -m pip -q install "torch==2.9.0" "setuptools>=77" packaging \
	  "pytest>=8" "hypothesis>=6" "expecttest>=0.3" numpy rich tqdm matplotlib
	TORCH_PAGED_NO_EXT=1 $(TPU_XLA_VENV)/bin/python -m pip -q install --no-build-isolation -e ".[tpu-xla,transformers]"
	touch $@

test-tpu-xla: $(TPU_XLA_VENV)/.ready $(LIBRARY)
	$(TPU_XLA_VENV)/bin/python -c "import torch_xla"
	$(TPU_XLA) $(filter-out $(THROUGH_XLA),$(wildcard tests/test_tpu_*.py)) $(ARGS)
	$(QUICKLY) $(TPU_XLA) $(THROUGH_XLA) $(ARGS)
	$(QUICKLY) $(XLA_CASES) $(SMALL_OPS:%=tests/test_%.py) tests/test_semantics.py -k "not direct and not beyond" $(ARGS)
	$(QUICKLY) $(XLA_CASES) tests/test_paged_attention.py tests/test_flash_attn_varlen.py -k "$(SOME_CASES)" $(ARGS)

# In the environment that is active: the one with torch_xla or torch_tpu.
test-tpu-device:
	@PYTHONPATH=. $(PYTHON) tests/tpu_device.py $(OPS:%=tests/test_%.py) tests/test_semantics.py \
	  -W ignore::DeprecationWarning -W ignore::UserWarning $(ARGS)

# The kernels' and the simulator's own tests; then the shared tests on CPU tensors, simulated. Where two cores share a
# kernel, the cases of the ops. Left out are programs without a kernel, and caches that this backend refuses.
test-neuron: $(LIBRARY)
	$(BIN)/python -m pytest -m "" $(wildcard tests/test_neuron_*.py tests/test_nki_sim_*.py) $(ARGS)
	TORCH_PAGED_DEBUG=1 $(call NKI,trn2,1) tests/test_bad_input.py $(ARGS)
	$(call NKI,trn2,1) $(CONFORMANCE) $(ARGS)
	$(call NKI,trn3,1) $(CONFORMANCE) $(ARGS)
	$(call NKI,trn2,2) $(OPS:%=tests/test_%.py) $(ARGS)
	$(call NKI,trn3,2) $(OPS:%=tests/test_%.py) $(ARGS)

# In the environment that is active: the one with torch-neuronx.
test-neuron-device:
	@PYTHONPATH=. $(PYTHON) tests/neuron_device.py $(OPS:%=tests/test_%.py) tests/test_semantics.py \
	  -W ignore::DeprecationWarning -W ignore::UserWarning $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

bench: $(LIBRARY) $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

instructions: $(LIBRARY)
	$(BIN)/python -m benchmarks.instructions $(ARGS)

mutants: $(LIBRARY)
	$(BIN)/python tests/mutants.py $(ARGS)

storm-allocator: $(LIBRARY)
	$(BIN)/python tests/allocator_storm.py $(ARGS)

storm-requests: $(LIBRARY)
	$(BIN)/python tests/request_storm.py $(ARGS)

storm: storm-allocator storm-requests

fuzz: $(LIBRARY)
	$(BIN)/python tests/fuzz.py $(ARGS)

# In a copy of the tree, whose library and objects stay apart.
asan: $(LIBRARY)
	mkdir -p build/asan
	git ls-files -z | xargs -0 cp -u --parents --preserve=timestamps -t build/asan
	cd build/asan && CXXFLAGS="$(ASAN)" LDFLAGS="$(ASAN)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	g++ -std=c++17 -fopenmp $(ASAN) -Icsrc_shims/cpu -o build/asan/kernels_test csrc_shims/tests/kernels_test.cpp \
	  build/asan/build/temp.*/csrc_shims/cpu/*.o
	build/asan/kernels_test
	cd build/asan && $(ASAN_RUN) $(abspath $(BIN))/python -m pytest $(SANITIZED) $(UNTIMED) $(ARGS)

# The second run plants a race, which must be reported.
tsan:
	mkdir -p build
	g++ -O1 -g1 -std=c++17 -fno-math-errno -fsanitize=thread -Icsrc_shims/tests/stub -Icsrc_shims/cpu \
	  -DTORCH_PAGED_LONG_WORK_BYTES=0 -DTORCH_PAGED_POLL_MS=1 -o build/threads_test csrc_shims/tests/threads_test.cpp $(GENERIC)
	build/threads_test
	! build/threads_test race 2>build/planted_race
	grep "data race" build/planted_race

fuzz-kernels: $(LIBRARY)
	PYTHONPATH=. $(BIN)/python tests/fuzz_kernels.py --seconds $(FUZZ_SECONDS) $(ARGS)

tpu-matrix: $(LIBRARY)
	JAX_PLATFORMS=cpu $(BIN)/python tests/tpu_matrix.py $(ARGS)

bench-tpu: $(LIBRARY) $(VENV)/.bench
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks tpu $(ARGS)

mutants-tpu: $(LIBRARY)
	$(BIN)/python tests/mutants_tpu.py $(ARGS)

bench-neuron: $(LIBRARY) $(VENV)/.bench
	$(BIN)/python -m benchmarks neuron $(ARGS)

mutants-neuron: $(LIBRARY)
	$(BIN)/python tests/mutants_neuron.py $(ARGS)

wheel: $(VENV)/.ready
	rm -rf dist build/bdist.* build/lib.*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist

test-wheel: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip -q install "torch==$(TORCH)" numpy dist/*.whl
	cd $(WHEEL_VENV) && bin/python ../tests/smoke.py

# The kernels that were built once, in an environment for each version of torch; each takes several GB and is removed.
test-torch-%: $(LIBRARY)
	rm -rf .venv-torch-$*
	$(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip -q install "torch==$*" "setuptools>=77" packaging "pytest>=8" "hypothesis>=6" \
	  "expecttest>=0.3" numpy rich tqdm matplotlib
	PYTHONPATH=. TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-torch-$*/bin/python -m pytest $(WITH_TORCH) $(ARGS)
	rm -rf .venv-torch-$*

test-torches: $(TORCHES:%=test-torch-%)

leaks: $(LIBRARY)
	PYTHONPATH=. $(BIN)/python tests/leaks.py $(ARGS)

test-reproducible-wheel: wheel
	$(BIN)/python tests/reproducible_wheel.py dist/*.whl

# By this Python, for itself: torch of another one has another hash. What is locked stays unless ARGS says otherwise.
lock:
	test -x $(LOCK_VENV)/bin/python || $(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip -q install "pip-tools>=7.6"
	echo "torch==$(TORCH)" | CUSTOM_COMPILE_COMMAND="make lock" $(LOCK_VENV)/bin/pip-compile -q --generate-hashes \
	  --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --extra test --extra transformers -o .ci/requirements.txt $(ARGS) pyproject.toml -

test-aarch64:
	@command -v $(CROSS) >/dev/null && command -v $(QEMU) >/dev/null || \
	  { echo "test-aarch64 needs $(CROSS) and $(QEMU): apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	mkdir -p build
	$(CROSS) -O2 -std=c++17 -fopenmp -fno-math-errno -Wall -static -Icsrc_shims/cpu -o build/kernels_test_aarch64 \
	  csrc_shims/tests/kernels_test.cpp $(GENERIC)
	$(QEMU) build/kernels_test_aarch64

clean:
	rm -rf $(VENV) $(WHEEL_VENV) $(LOCK_VENV) $(TPU_VENV) $(TPU_XLA_VENV) .venv-torch-* .venv-transformers-*
	rm -rf build dist *.egg-info torch_paged/*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
