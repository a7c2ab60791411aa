"""Loads the compiled TensorFlow ops, on first use and once per process."""

import ctypes
import sys
import threading

from . import libraries
from .cuda import kernels

_loaded = {}
_lock = threading.Lock()


def attention_ops():
    """The module with the attention ops, or None where they cannot be had.

    The first call looks for the library and compiles it if it must; see `libraries.py`.
    """
    return _load("attention_ops")


def blocksparse_ops():
    """The same for the ops that carry blocksparse's names."""
    return _load("blocksparse_ops")


def _load(name):
    with _lock:
        if name not in _loaded:
            _loaded[name] = _open(name)
        return _loaded[name]


def _open(name):
    import tensorflow as tf

    path = libraries.library(name)
    try:
        ops = path and tf.load_op_library(path)
    except tf.errors.NotFoundError as error:  # so TensorFlow says that dlopen failed
        sys.stderr.write(f"sparse_attention: does not load: {error.message}\n")
        path = libraries.library(name, broken=path)
        ops = path and tf.load_op_library(path)
    if ops:
        ops.path = path
        ops.core = ctypes.CDLL(path)  # the same library, for what is no op
        kernels.attach(ops.core)
    return ops
