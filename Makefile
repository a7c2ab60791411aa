# Every target first makes the virtual environment it needs, once: .venv with TensorFlow 2,
# .venv-tf1 with TensorFlow 1.15, .venv-numpy without either, .venv-lint.
#
#   make example                       the example on this machine's CPU or GPU
#   make test ARGS="-k wheel"          ARGS goes to pytest

export PYTHONPATH := $(CURDIR)
PYTEST = -m pytest $(ARGS)
NUMPY_TESTS = $(wildcard $(patsubst %,tests/test_%.py,layouts masks block_mask tile_plans reference))
CXX_SOURCES = $(shell find sparse_attention/csrc -type f ! -name '*.md')

.PHONY: example test test-tf1 test-numpy test-cuda test-sanitized lint format

example: .venv/ready
	.venv/bin/python examples/attention.py

test: .venv/ready
	.venv/bin/python $(PYTEST)

test-tf1: .venv-tf1/ready
	.venv-tf1/bin/python $(PYTEST)

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
	.venv-numpy/bin/python $(PYTEST) -p tests.sanitized --capture=sys tests/test_core.py

lint: .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	.venv-lint/bin/mypy

format: .venv-lint/ready
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $(CXX_SOURCES)

.venv/ready: PYTHONS = 3.13 3.12 3.11 3.10
.venv-tf1/ready: PYTHONS = 3.7
.venv-numpy/ready .venv-lint/ready: PYTHONS = 3.14 3.13 3.12 3.11

.venv/ready: requirements/tf2.txt
.venv-tf1/ready: requirements/tf1.txt
.venv-numpy/ready: requirements/numpy.txt
.venv-lint/ready: requirements/lint.txt
.venv/ready .venv-tf1/ready .venv-numpy/ready .venv-lint/ready:
	rm -rf $(@D)
	python=$$(tools/find_python.sh $(PYTHONS)) && "$$python" -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@
