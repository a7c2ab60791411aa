"""Loads the compiled TensorFlow ops, on first use and once per process.

A library that cannot be compiled or does not load is tried once: what was in its way is
remembered, and TensorFlow's own ops do the work for as long as the process lives.
"""

import ctypes
import os
import threading
from collections import namedtuple

from . import libraries
from .cuda import kernels

Loaded = namedtuple("Loaded", "ops why_not")  # a module and None, or None and a str

_loaded = {}
_lock = threading.Lock()


def _renew_lock():
    """A thread that held it when its process was forked is not there in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def attention_ops():
    """The module with the attention ops, or None where they cannot be had.

    The first call looks for the library and compiles it if it must; see `libraries.py`.
    """
    return _load("attention_ops").ops


def blocksparse_ops():
    """The same for the ops that carry blocksparse's names."""
    return _load("blocksparse_ops").ops


def attention_xla():
    """The library by which XLA compiles the attention ops, or None where there is none.

    It holds a copy of the kernels of its own, as every library does: TensorFlow loads
    each by itself. It is loaded after the ops, whose names it refers to.
    """
    return attention_ops() and _load("attention_xla").ops


def why_not(name):
    """str: what is in the way of a library's ops; None where they are loaded."""
    return _load(name).why_not


def _load(name):
    with _lock:
        if name not in _loaded:
            _loaded[name] = _open(name)
        return _loaded[name]


def _in_short(error):
    """str: how the compiler ended, its first complaint, and what it is."""
    how, *said = str(error).split("\n")
    words = ("error", "undefined reference", "cannot find")
    complaints = [line for line in said[1:] if any(w in line.lower() for w in words)]
    compiler = libraries.compiler()
    version = f"({compiler.version}; g++ 7 or clang++ 5 is needed)" if compiler else ""
    return " ".join([how, *complaints[:1], version])


def _open(name):
    import tensorflow as tf

    unfit = {}  # paths of libraries that do not load: why
    while True:
        try:
            path = libraries.library(name, unfit=unfit)
        except OSError as error:  # the cache cannot be written, say
            return Loaded(None, f"{name} cannot be compiled: {error}")
        except RuntimeError as error:
            return Loaded(None, f"{name} cannot be compiled: {_in_short(error)}")
        if path is None:
            whys = unfit.values() or [libraries.why_no_compiling(name)]
            return Loaded(None, "; ".join(whys))
        try:
            ops = tf.load_op_library(path)
            ops.path = path
            ops.core = ctypes.CDLL(path)  # the same library, for what is not an op
        except (tf.errors.OpError, OSError) as error:
            unfit[path] = f"{name} does not load: {getattr(error, 'message', error)}"
            continue
        kernels.attach(ops.core)
        if name == "attention_xla":
            ops.core.spattn_xla_register()
        return Loaded(ops, None)
