"""Says what this installation uses, and why, and checks the numbers it gives.

    python -m sparse_attention.doctor

Exit status 0 when attention gives the right numbers here, compiled or not; otherwise 1.
"""

import ctypes
import glob
import os
import platform
import sys

import numpy as np

import sparse_attention

from .native import cache, libraries
from .native.cuda import devices, nvrtc
from .plan import reference
from .plan.patterns import pattern_block_mask


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _tell("sparse_attention", f"{sparse_attention.__version__}, {libraries.PACKAGE}")
    _tell("Python", f"{platform.python_version()}, {sys.executable}")
    for subject, text in _gpus():
        _tell(subject, text)
    try:
        import tensorflow as tf
    except ImportError as error:
        _tell("TensorFlow", f"does not import: {error}")
        return 1
    _tell("TensorFlow", f"{tf.__version__}, {os.path.dirname(tf.__file__)}")
    found = libraries.compiler()
    _tell("compiler", found.version if found else "none")
    _tell("cache", ", ".join(cache.cache_folders()))
    for name in libraries.LIBRARIES:
        if libraries.is_for_tensorflow(name):
            _tell(name, libraries.find(name).why)
    try:
        _tell("in use", _what_runs())
        largest = _largest_error()
    except Exception as error:
        _tell("check", f"failed: {type(error).__name__}: {error}")
        return 1
    is_right = largest < 1e-5  # a NaN is not
    _tell("check", f"{'right' if is_right else 'WRONG'}, largest error {largest:.1e}")
    return 0 if is_right else 1


def _tell(subject, text):
    print(f"{subject:<18}{text}", flush=True)


def _gpus():
    """(subject, text) of the driver, the GPUs, NVRTC and the kernels."""
    version = devices.driver_version()
    has = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"
    yield "NVIDIA driver", has
    archs = []
    for name, arch in devices.devices():
        yield "GPU", f"{name}, {devices.name_of(arch)}"
        archs.append(devices.name_of(arch))
    for arch in dict.fromkeys(archs):
        try:
            found = nvrtc.find_nvrtc(arch)
            yield "NVRTC", f"{found.version} for {arch}, {found.path}"
        except RuntimeError as error:
            yield "NVRTC", str(error)
    kernels = sum(
        len(glob.glob(os.path.join(glob.escape(folder), "*-nvrtc*", "*.bin")))
        for folder in cache.cache_folders()
    )
    yield "GPU kernels", f"{kernels} in the cache"


def _what_runs():
    from .native import loader

    ops = loader.attention_ops()
    if ops is None:
        why_not = loader.why_not("attention_ops")
        return f"TensorFlow's own ops, which are slower: {why_not}"
    isa = ctypes.CDLL(ops.path).spattn_cpu_isa
    isa.restype = ctypes.c_char_p
    return f"{isa().decode()} kernels of {ops.path}"


def _largest_error():
    """Of o, dq, dk and dv, each in units of its largest value, on a small problem."""
    import tensorflow as tf

    from .ops.attention import block_sparse_attention

    batch, length, heads, head_dim = 2, 72, 2, 16  # 72: the last block is not whole
    block_mask = pattern_block_mask("local", length, heads, 16, local_attn_ctx=24)
    random = np.random.RandomState(0)
    q, k, v, do = random.normal(size=(4, batch, length, heads, head_dim))
    mask = block_mask.to_dense()
    want = [reference.attention_fwd(q, k, v, mask)[0]]
    want += reference.attention_bwd(q, k, v, mask, do)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        q, k, v, do = (
            tf.constant(x.reshape(batch, length, -1), tf.float32) for x in (q, k, v, do)
        )
        o = block_sparse_attention(q, k, v, block_mask, heads)
        got = session.run([o, *tf.compat.v1.gradients(o, [q, k, v], do)])
    errors = [np.abs(g.reshape(w.shape) - w).max() for g, w in zip(got, want)]
    return np.max(np.divide(errors, [np.abs(w).max() for w in want]))


if __name__ == "__main__":
    sys.exit(main())
