"""What all tests share: quiet TensorFlow logs, and tests that need a GPU."""

import ctypes
import functools
import os
import platform
import shutil
import sys

import pytest
from fake_cuda import fakes, machine  # noqa: F401
from require import is_required

# They need Keras 3 or other things that Python 3.7 and its TensorFlow 1.15 do not have.
NEWER_TESTS = [
    f"test_{name}.py"
    for name in (
        "attention_layers check_numerics flash_attention generation gpu_training keras_3 "
        "model_images model_rules models new_pattern portable recompute_layers "
        "train_images train_lm xla"
    ).split()
]
collect_ignore = NEWER_TESTS if sys.version_info < (3, 8) else []

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # processes share a GPU
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small products: threads only spin


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    needed = max(marker.args, default=1)
    if gpu_count() < needed:
        message = f"GPUs needed: {needed}; the driver shows {gpu_count()}"
        if is_required(needed):
            pytest.fail(message)
        pytest.skip(message)


@functools.lru_cache(maxsize=None)
def gpu_count():
    """Asks the driver, not TensorFlow, which takes seconds and memory to start."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))  # leaves 0 where it fails
    return count.value


def instruction_sets():
    """Those that this machine can run, by the flags Linux shows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["baseline"]
    with open("/proc/cpuinfo") as cpuinfo:
        flags = cpuinfo.read().split()
    needs = {
        "baseline": "sse2",
        "avx2": "avx2",
        "avx512": "avx512vl",
        "avx512_bf16": "avx512_bf16",
    }
    return [isa for isa, flag in needs.items() if flag in flags]


@pytest.fixture(scope="module", params=instruction_sets())
def core(request, tmp_path_factory):
    """The library, made to use one instruction set; it reads the variable once."""
    from core_abi import Core

    from sparse_attention.native import libraries

    copy = tmp_path_factory.mktemp(request.param) / "core.so"
    shutil.copy(libraries.build_core(), str(copy))
    previous = os.environ.get("SPARSE_ATTENTION_ISA")
    os.environ["SPARSE_ATTENTION_ISA"] = request.param
    try:
        core = Core(copy)
        assert core.isa() == request.param
    finally:
        os.environ.pop("SPARSE_ATTENTION_ISA")
        if previous is not None:
            os.environ["SPARSE_ATTENTION_ISA"] = previous
    return core


@pytest.fixture(params=["op", "fallback"])
def path(request, monkeypatch):
    """The compiled op, or what stands in for it."""
    from tf_helpers import take_kernels_away

    if request.param == "fallback":
        take_kernels_away(monkeypatch)
    return request.param
