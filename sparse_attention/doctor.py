"""Says what this installation uses, what is missing and the remedy, and checks numbers.

    python -m sparse_attention.doctor            # a report to paste into an issue
    python -m sparse_attention.doctor --json     # the same facts for a program
    python -m sparse_attention.doctor --library  # the path of the ops, for TensorFlow

Exit status 0 when attention gives the right numbers here, compiled or not; otherwise 1.
With --library 0 when there is a library that loads.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import os
import platform
import sys
import warnings
from typing import NamedTuple

import numpy as np

import sparse_attention

from .native import cache, libraries
from .native.cuda import devices, kernels, nvrtc
from .plan import reference
from .plan.patterns import pattern_block_mask

# What changes how we, TensorFlow and Keras run.
VARIABLES = (
    *("CXX", "CUDA_VISIBLE_DEVICES", "KERAS_BACKEND", "NVIDIA_TF32_OVERRIDE"),
    *("TF_DETERMINISTIC_OPS", "TF_USE_LEGACY_KERAS", "TF_XLA_FLAGS", "XDG_CACHE_HOME"),
)
NO_COMPILER = (
    "install g++ 7 or later or clang++ 5 or later, or name one in CXX; without one, "
    "install the wheel for this TensorFlow, or one that `python setup.py bdist_wheel` made "
    "where there is one"
)


REPORT = "open an issue with this report"


class Fact(NamedTuple):
    subject: str
    text: str
    remedy: str | None = None  # what to do where something is missing


def main(arguments=()):
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention.doctor", description=__doc__.split("\n")[0]
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="print the facts as JSON")
    kinds.add_argument(
        "--library",
        action="store_true",
        help="print the path of the library of ops, for tf.load_op_library, and no more; "
        "it is compiled if need be",
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.library:
        return _print_library()
    facts, is_right = [], False
    for look in (_versions, _gpus, _libraries, _check):
        try:
            for fact in look():
                facts.append(fact)
                is_right = fact.subject == "check" and fact.remedy is None
                if not options.json:
                    _tell(fact.subject, fact.text)
        except Exception as error:  # one look that fails hides no other
            facts.append(
                Fact("doctor", f"{look.__name__} failed: {_named(error)}", REPORT)
            )
            if not options.json:
                _tell(*facts[-1][:2])
    missing = [fact for fact in facts if fact.remedy]
    if options.json:
        print(json.dumps(_as_json(facts, missing, is_right), indent=2))
    else:
        for fact in missing:
            _tell("to do", f"{fact.subject}: {fact.remedy}")
    return 0 if is_right else 1


def _as_json(facts, missing, is_right):
    by_subject: dict = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact.text)
    to_do = [{"subject": fact.subject, "remedy": fact.remedy} for fact in missing]
    return {"facts": by_subject, "to do": to_do, "right": is_right}


def _tell(subject, text):
    print(f"{subject:<18}{text}", flush=True)


def _named(error):
    return f"{type(error).__name__}: {error}"


def _print_library():
    try:
        from .native import loader

        ops = loader.attention_ops()
        why_not = None if ops else loader.why_not("attention_ops")
    except Exception as error:  # of TensorFlow's import, too
        ops, why_not = None, _named(error)
    if ops is None:
        sys.stderr.write(f"there is no library of ops: {why_not}\n")
        return 1
    print(ops.path)
    return 0


# ---- looks: each yields facts ----


def _versions():
    yield Fact(
        "sparse_attention", f"{sparse_attention.__version__}, {libraries.PACKAGE}"
    )
    yield Fact("Python", f"{platform.python_version()}, {sys.executable}")
    yield Fact("platform", f"{platform.platform()}, {os.cpu_count()} CPUs")
    yield Fact("NumPy", np.__version__)
    names = [n for n in sorted(os.environ) if n.startswith("SPARSE_ATTENTION_")]
    names += [name for name in VARIABLES if name in os.environ]
    yield Fact(
        "environment", ", ".join(f"{n}={os.environ[n]}" for n in names) or "as it comes"
    )
    try:
        import tensorflow as tf
    except Exception as error:  # a broken one raises whatever it likes
        yield Fact(
            "TensorFlow", f"does not import: {error}", "`pip install tensorflow`"
        )
        return
    yield Fact("TensorFlow", f"{tf.__version__}, {os.path.dirname(tf.__file__)}")
    try:
        from .keras.backend import VERSION, keras

        yield Fact("Keras", f"{VERSION}, {os.path.dirname(keras.__file__)}")
    except ImportError as error:  # it says the remedy
        yield Fact("Keras", "does not import", str(error))


def _gpus():
    """The driver, the GPUs, NVRTC and the kernels."""
    version = devices.driver_version()
    has = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"
    yield Fact("NVIDIA driver", has)
    archs = []
    for name, arch in devices.devices():
        yield Fact("GPU", f"{name}, {devices.name_of(arch)}")
        archs.append(devices.name_of(arch))
    for arch in dict.fromkeys(archs):
        try:
            found = nvrtc.find_nvrtc(arch)
            yield Fact("NVRTC", f"{found.version} for {arch}, {found.path}")
        except RuntimeError as error:
            yield Fact("NVRTC", f"none for {arch}", str(error))
    shipped, cached = (
        sum(
            len(glob.glob(os.path.join(glob.escape(folder), "*-nvrtc*", "*.bin")))
            for folder in folders
        )
        for folders in ([kernels.SHIPPED], cache.cache_folders())
    )
    yield Fact(
        "GPU kernels", f"{shipped} shipped in the package, {cached} in the cache"
    )
    if archs and sys.modules.get("tensorflow") and not devices.visible_archs():
        yield Fact(
            "TensorFlow's GPUs",
            "none",
            '`pip install "tensorflow[and-cuda]"`, unless CUDA_VISIBLE_DEVICES hides them',
        )


def _libraries():
    found = libraries.compiler()
    yield Fact("compiler", found.version if found else "none")
    folders = cache.cache_folders()
    remedy = None
    if len(folders) > 1:
        remedy = (
            f"{folders[0]} cannot be written: what is compiled is kept in a temporary "
            "folder; name one that can in SPARSE_ATTENTION_CACHE_DIR"
        )
    yield Fact("cache", ", ".join(folders), remedy)
    if not sys.modules.get("tensorflow"):
        return
    for name in libraries.LIBRARIES:
        if libraries.is_for_tensorflow(name):
            yield Fact(name, libraries.find(name).why)


def _check():
    if not sys.modules.get("tensorflow"):
        return
    from .native import loader

    ops = loader.attention_ops()
    if ops is None:
        why_not = loader.why_not("attention_ops")
        yield Fact(
            "in use",
            f"TensorFlow's own ops, which are slower: {why_not}",
            _remedy_for_no_ops(),
        )
    else:
        isa = ctypes.CDLL(ops.path).spattn_cpu_isa
        isa.restype = ctypes.c_char_p
        yield Fact("in use", f"{isa().decode()} kernels of {ops.path}")
    largest = _largest_error()
    if largest < 1e-5:  # a NaN is not
        yield Fact("check", f"right, largest error {largest:.1e}")
    else:
        yield Fact(
            "check",
            f"WRONG, largest error {largest:.1e}",
            f"{REPORT}; SPARSE_ATTENTION_ISA=baseline may avoid it",
        )


def _remedy_for_no_ops():
    if cache.is_set("SPARSE_ATTENTION_NO_JIT"):
        return "unset SPARSE_ATTENTION_NO_JIT, or install the wheel for this TensorFlow"
    if libraries.compiler() is None:
        return NO_COMPILER
    return f"SPARSE_ATTENTION_VERBOSE=1 shows the compiler's commands; {REPORT}"


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
        with warnings.catch_warnings():  # what it would warn of stands in the report
            warnings.simplefilter("ignore", RuntimeWarning)
            o = block_sparse_attention(q, k, v, block_mask, heads)
        got = session.run([o, *tf.compat.v1.gradients(o, [q, k, v], do)])
    errors = [np.abs(g.reshape(w.shape) - w).max() for g, w in zip(got, want)]
    return np.max(np.divide(errors, [np.abs(w).max() for w in want]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
