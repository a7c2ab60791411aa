# Every target first makes the virtual environment it needs, once: .venv with TensorFlow 2,
# .venv-tf1 with TensorFlow 1.15, .venv-numpy without either, .venv-lint, .venv-docs,
# .venv-release;
# .venv-versions/ has one for each other TensorFlow, and .venv-keras-hub is .venv with KerasHub.
#
#   make example                       the example on this machine's CPU or GPU
#   make test ARGS="-k wheel"          ARGS goes to pytest

export PYTHONPATH := $(CURDIR)
PYTEST = -m pytest $(ARGS)
NUMPY_TESTS = $(wildcard $(patsubst %,tests/test_%.py,layouts masks windows tokens images \
  longformer bigbird deepspeed patterns block_mask tile_plans reference dropout))
CXX_SOURCES = $(shell find sparse_attention/csrc -type f ! -name '*.md')

VERSIONS = 2.12 2.13 2.14 2.15 2.16 2.17 2.18 2.19 2.20 2.21 tf_keras

.PHONY: example test test-tf1 test-keras-hub test-versions test-matrix test-numpy test-cuda test-sanitized \
  fuzz-sanitized lint format docs release

# The pages, in build/docs. A warning is an error, also of a link that leads nowhere.
docs: .venv-docs/ready
	rm -rf build/docs
	.venv-docs/bin/sphinx-build -q -W --keep-going -c docs . build/docs

# What is released, in dist/: the sources, and a wheel with the compiled ops for TensorFlow 1.15
# and each that has an environment in .venv-versions, and with the CUDA kernels of KERNELS.
# auditwheel gives each the manylinux tag that holds where it was compiled. Each wheel is installed
# and tested where there is neither a compiler nor NVRTC, the sources by each test, too.
#   make release RELEASE="2.20 2.21"
RELEASE = 1.15 $(filter-out tf_keras,$(patsubst .venv-versions/%/ready,%,$(wildcard .venv-versions/*/ready)))
KERNEL_SIZES = --arch sm_70,sm_75,sm_80,sm_86,sm_89,sm_90a --head-dim 32,64,128
# Blocks of 32 are the default, and of 64 those of sa.enable_flash_attention().
KERNELS = $(KERNEL_SIZES) --block-size 32; $(KERNEL_SIZES) --block-size 64 --pattern all

release: .venv/ready .venv-tf1/ready .venv-numpy/ready .venv-release/ready
	rm -rf dist build/kernels build/wheels
	echo "$(KERNELS)" | tr ';' '\n' | while read -r sizes; do \
	  .venv-numpy/bin/python -m sparse_attention.build $$sizes --out build/kernels || exit; done
	.venv/bin/python setup.py -q sdist
	set -e; for version in $(RELEASE); do \
	  case $$version in 1.15) python=.venv-tf1/bin/python ;; *) python=.venv-versions/$$version/bin/python ;; esac; \
	  $$python setup.py -q egg_info --tag-build +tf$$version bdist_wheel --dist-dir build/wheels \
	    --kernels build/kernels; \
	  PATH=$(CURDIR)/.venv-release/bin:$$PATH auditwheel repair --exclude 'libtensorflow*' \
	    --wheel-dir dist build/wheels/*+tf$$version-*.whl; \
	  SPARSE_ATTENTION_WHEEL=$$(ls dist/*+tf$$version-*.whl) SPARSE_ATTENTION_KERNELS="$(KERNELS)" \
	    $$python $(PYTEST) -q tests/test_wheel.py; \
	done
	ls -sh dist

example: .venv/ready
	.venv/bin/python examples/attention.py

test: .venv/ready
	.venv/bin/python $(PYTEST)

test-tf1: .venv-tf1/ready
	.venv-tf1/bin/python $(PYTEST)

# KerasHub's models with flash attention on and off.
test-keras-hub: .venv-keras-hub/ready
	.venv-keras-hub/bin/python $(PYTEST) tests/hub

# The smoke test on other TensorFlows, each in an environment of its own, and on tf_keras, the
# Keras 2 beside TensorFlow 2.18. That of 2.18 has the oldest Keras 3 that is supported:   make test-versions VERSIONS="2.15 2.18"
test-versions: $(VERSIONS:%=test-version-%)

test-version-%: .venv-versions/%/ready
	$(if $(filter tf_keras,$*),TF_USE_LEGACY_KERAS=1) .venv-versions/$*/bin/python $(PYTEST) tests/versions

# The op's, the layer's, SavedModels' and recompute's tests on each TensorFlow, Keras, Python, NumPy
# and compiler of tools/version_matrix.py, which takes an hour; then the table in the docs.
#   make test-matrix ARGS="2.15 keras-3.12"
test-matrix: .venv/ready
	.venv/bin/python tools/version_matrix.py run $(ARGS)
	.venv/bin/python tools/version_matrix.py write

test-numpy: .venv-numpy/ready
	.venv-numpy/bin/python $(PYTEST) $(NUMPY_TESTS)

# Compiles every CUDA kernel for every architecture; needs no GPU.
test-cuda: .venv-numpy/ready
	.venv-numpy/bin/python $(PYTEST) tests/gpu/test_cuda_compile.py

# The core under AddressSanitizer and UndefinedBehaviorSanitizer, which want to be loaded
# before anything else. Python itself leaks, and NumPy's memory must come from malloc.
test-sanitized: .venv-numpy/ready
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	.venv-numpy/bin/python $(PYTEST) -p tests.sanitized --capture=sys tests/test_core.py tests/test_core_rules.py

# Crafted calls of the ops under the sanitizers:   make fuzz-sanitized ARGS="--seed 7"
fuzz-sanitized: .venv/ready
	.venv/bin/python -m tests.fuzz --sanitized $(or $(ARGS),--calls 10000 --rewrite 3 --jobs 2)

lint: .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	.venv-lint/bin/mypy
	.venv-lint/bin/mypy tests/typing_user.py

format: .venv-lint/ready
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $(CXX_SOURCES)

.venv/ready: PYTHONS = 3.13 3.12 3.11 3.10
.venv-tf1/ready: PYTHONS = 3.7
.venv-numpy/ready .venv-lint/ready .venv-docs/ready .venv-release/ready: PYTHONS = 3.14 3.13 3.12 3.11

.venv-versions/%/ready: requirements/versions.txt
	rm -rf $(@D)
	python=$$(tools/find_python.sh 3.11 3.10) && "$$python" -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $< $(if $(filter tf_keras,$*),\
	  "tensorflow-cpu~=2.18.0" "tf_keras~=2.18.0", "tensorflow-cpu~=$*.0") \
	  $(if $(filter 2.18,$*),"keras==3.10.0")
	touch $@

# It sees the packages of .venv. What KerasHub needs to tokenize text or to download stays out.
.venv-keras-hub/ready: requirements/keras_hub.txt .venv/ready
	rm -rf $(@D)
	.venv/bin/python -m venv $(@D)
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  .venv/bin/python -c "$$packages" > "$$($(@D)/bin/python -c "$$packages")/venv.pth"
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

.venv/ready: requirements/tf2.txt
.venv-tf1/ready: requirements/tf1.txt
.venv-numpy/ready: requirements/numpy.txt
.venv-lint/ready: requirements/lint.txt
.venv-docs/ready: requirements/docs.txt
.venv-release/ready: requirements/release.txt
.venv/ready .venv-tf1/ready .venv-numpy/ready .venv-lint/ready .venv-docs/ready .venv-release/ready:
	rm -rf $(@D)
	python=$$(tools/find_python.sh $(PYTHONS)) && "$$python" -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@
