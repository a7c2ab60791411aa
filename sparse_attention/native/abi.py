"""The C ABI of csrc/abi in ctypes: structs, and what a library says of its kernels."""

import ctypes

from ..plan import tiling

DTYPES = ("float32", "float16", "bfloat16")  # in the order of SpattnDtype
PHASES = ("fwd", "bwd_delta", "bwd_dq", "bwd_dkv")  # in the order of SpattnPhase
# That follow there.
RULE_PHASES = (
    *("rule_words", "rule_ranges", "rule_lists", "rule_bias_gradient", "rule_pairs"),
)
# In place of bwd_dq and bwd_dkv, where a shape has them; these follow RULE_PHASES.
LONG_PHASES = ("bwd", "bwd_ranks", "bwd_finish")
# Bits of `rule` in a Shape, in the order of SpattnRuleParts.
RULE_PARTS = ("softcap", "alibi", "bias", "segments", "mask", "dropout", "bias_sums")
BLOCKS_OPS = (  # in the order of SpattnBlocksOp
    "nt",
    "nn",
    "tn",
    "listed",
    "softmax",
    "masked_softmax",
    "softmax_grad",
    "mask",
)
# Values of list_keys of Shape: from each on, configs.cc may choose other kernels.
LIST_KEYS = (0, 1024, 2048)
UNSUPPORTED = 2  # of SpattnCode


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 252)]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("arch", "dtype", "head_dim", "head_dim_v"),
            *("is_row_strided", "is_scale_positive", "uses_tf32", "block_size"),
            *("tile_q", "tile_kv", "list_keys", "rule"),
        )
    ]


class BlocksShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("arch", "block_size", "dtype", "scores_dtype", "weights_dtype"),
            "head_dim",
        )
    ]


class Kernel(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 32), ("macros", ctypes.c_char * 512)] + [
        (name, ctypes.c_int32) for name in ("shared_memory", "threads", "splits")
    ]


def shape_of(library, arch, dtype, head_dims, block_mask):
    """The `Shape` of a BlockMask, with the largest tiles that fit the device.

    Args:
      library: `ctypes.CDLL` of a library with the core in it.
      arch: Compute capability as 90 of 9.0.
      dtype: One of DTYPES.
      head_dims: head_dim and head_dim_v.
      block_mask: `BlockMask`.
    """
    shape = Shape(arch, DTYPES.index(dtype), *head_dims)
    shape.is_row_strided, shape.is_scale_positive = block_mask.row_stride > 1, True
    shape.block_size = block_mask.block_size
    library.spattn_cuda_tiles(ctypes.byref(shape))
    return shape


def kernel_of(library, shape, phase):
    """The `Kernel` of a `Shape`; `phase` is one of PHASES, RULE_PHASES or LONG_PHASES.

    Its name is empty where there is none, which is so for LONG_PHASES alone.
    """
    kernel = Kernel()
    number = (*PHASES, *RULE_PHASES, *LONG_PHASES).index(phase)
    library.spattn_cuda_kernel(ctypes.byref(shape), number, ctypes.byref(kernel))
    return kernel


def blocks_kernel_of(library, op, arch, block_size, dtype, scores, weights, head_dim):
    """The `Kernel` of one of BLOCKS_OPS; `dtype`, `scores`, `weights` are of DTYPES."""
    dtypes = map(DTYPES.index, (dtype, scores, weights))
    shape, kernel = BlocksShape(arch, block_size, *dtypes, head_dim), Kernel()
    number = BLOCKS_OPS.index(op)
    library.spattn_cuda_blocks_kernel(ctypes.byref(shape), number, ctypes.byref(kernel))
    return kernel


def blocks_kernels(library, arch, block_size, dtype, head_dim):
    """{what it does: `Kernel`} of all that `BlocksparseTransformer` runs on a dtype.

    Its scores are bfloat16, and so are its weights, save for float16 queries.
    """
    scores, weights = "bfloat16", "float16" if dtype == "float16" else "bfloat16"
    uses = {}
    for op in BLOCKS_OPS:
        for operand in {scores, weights} if op in ("nt", "nn", "tn") else [scores]:
            uses[f"{op} {operand}"] = blocks_kernel_of(
                library, op, arch, block_size, dtype, operand, weights, head_dim
            )
    return uses


def plans(library, archs, dtype, head_dims, block_mask, group):
    """The `Tiles` and `KvTiles` of a BlockMask that suit all of some GPUs.

    Args:
      library: `ctypes.CDLL` of a library with the core in it.
      archs: Compute capabilities of the GPUs; the tiles fit each of them.
      dtype: One of DTYPES.
      head_dims: head_dim and head_dim_v.
      block_mask: `BlockMask`.
      group: Query heads that share a kv head.
    """
    shapes = [shape_of(library, arch, dtype, head_dims, block_mask) for arch in archs]
    return tiling.choose(
        block_mask,
        min(shape.tile_q for shape in shapes),
        min(shape.tile_kv for shape in shapes),
        head_dims,
        group,
    )
