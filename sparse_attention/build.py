"""Compiles ahead what the first calls would compile, into the cache.

    python -m sparse_attention.build --arch sm_70,sm_80,sm_90a --dtype float16

compiles the ops and, for GPUs of those architectures, the kernels that the patterns run,
those of the three ops among them. It needs NVRTC, but no GPU. A machine to which the cache is
copied needs neither NVRTC nor a compiler to run the kernels. With --out they are copied into a
folder too, which `python setup.py bdist_wheel --kernels FOLDER` ships.
"""

import argparse
import ctypes
import itertools
import sys

from .native import abi, libraries
from .native.cuda import kernels
from .native.cuda.devices import name_of
from .plan.block_mask import BlockMask
from .plan.patterns import PATTERNS
from .plan.tiling import EFFICIENCY, kv_tile_sizes


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sparse_attention.build", description=__doc__.split("\n")[0]
    )
    for name, parse, default in (
        ("arch", _arch, []),
        ("dtype", _one_of(abi.DTYPES), ["float32", "float16", "bfloat16"]),
        ("head-dim", int, [64]),
        ("block-size", _one_of(EFFICIENCY, int), [32]),
        ("pattern", _one_of(PATTERNS), list(PATTERNS)),
    ):
        said = "with commas between; default: " + (
            ",".join(map(str, default)) or "none"
        )
        parser.add_argument(
            f"--{name}", type=_list_of(parse), default=default, help=said
        )
    parser.add_argument(
        "--out", metavar="FOLDER", help="a folder to copy the kernels into"
    )
    options = parser.parse_args(arguments)
    try:
        attention, blocksparse = _cores()
        for arch in options.arch:
            for kernel, macros in _kernels(attention, blocksparse, arch, options):
                path = kernels.compiled(kernel, macros, name_of(arch))
                if options.out is not None:
                    kernels.copy(path, options.out)
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _list_of(parse):
    return lambda text: [parse(word) for word in text.split(",")]


def _one_of(names, parse=str):
    def one(word):
        if parse(word) not in names:
            known = ", ".join(map(str, names))
            raise argparse.ArgumentTypeError(f"must be of {known}, got {word}")
        return parse(word)

    return one


def _arch(word):
    """The architecture as a number: 90 for "sm_90a"."""
    digits = word[len("sm_") :].rstrip("a")
    if not word.startswith("sm_") or not digits.isdigit():
        raise argparse.ArgumentTypeError(f"must be like sm_80, got {word}")
    return int(digits)


def _cores():
    """Compiles all libraries; returns those with the core of attention and of the ops.

    With TensorFlow these are the libraries of the ops, and without it one of its own.
    """
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        path = libraries.build_core()
        if path is None:
            why = libraries.why_no_compiling()
            raise RuntimeError(f"spattn_core cannot be had: {why}") from None
        return [ctypes.CDLL(path)] * 2
    from .native import loader

    names = "attention_ops", "blocksparse_ops"
    modules = [loader.attention_ops(), loader.blocksparse_ops()]
    for name, module in zip(names, modules):
        if module is None:
            raise RuntimeError(f"{name} cannot be had: {loader.why_not(name)}")
    return [module.core for module in modules]


def _kernels(attention, blocksparse, arch, options):
    """The (kernel, macros) of every kernel that the options name, sorted.

    Args:
      attention, blocksparse: The libraries with the core of each.
    """
    found = []
    # Kernels differ by whether rows are strided, not by how far.
    strides = {
        1 if PATTERNS[name].row_stride is None else 2 for name in options.pattern
    }
    for dtype, head_dim, block_size in itertools.product(
        options.dtype, options.head_dim, options.block_size
    ):
        if block_size <= 64:  # The three ops have no larger blocks.
            sizes = arch, block_size, dtype, head_dim
            found += abi.blocks_kernels(blocksparse, *sizes).values()
        if dtype == "bfloat16" and arch < 80:
            continue
        for row_stride in strides:
            block_mask = BlockMask([[True]], None, block_size, row_stride=row_stride)
            shape = abi.shape_of(attention, arch, dtype, [head_dim] * 2, block_mask)
            sizes = kv_tile_sizes(shape.tile_kv, block_size, [head_dim])
            for shape.tile_kv, shape.uses_tf32, phase in itertools.product(
                sizes, (0, 1), abi.PHASES
            ):
                found.append(abi.kernel_of(attention, shape, phase))
            for shape.list_keys in abi.LIST_KEYS:
                found.append(abi.kernel_of(attention, shape, "fwd"))
            for shape.tile_kv, shape.list_keys, phase in itertools.product(
                sizes, abi.LIST_KEYS, abi.LONG_PHASES
            ):
                found.append(abi.kernel_of(attention, shape, phase))
    return sorted({(k.name.decode(), k.macros.decode()) for k in found if k.name})


if __name__ == "__main__":
    sys.exit(main())
