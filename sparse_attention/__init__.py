"""Block-sparse fused attention for TensorFlow.

    import sparse_attention as sa

    block_mask = sa.BlockMask(sa.local_layout(1024, 64, 256), sa.local_mask(256), 64)
    o = sa.block_sparse_attention(q, k, v, block_mask, heads=8)

What builds plans needs NumPy alone; TensorFlow is imported when something that runs on
it is first asked for.
"""

import importlib

from . import block_mask, layouts, masks, reference
from .block_mask import EMPTY, FULL, PARTIAL, BlockMask, pattern_block_mask
from .layouts import (
    all_layout,
    chunk_layout,
    dense_layout,
    fixed_layout,
    local_layout,
    mask_layout,
    sink_layout,
    strided_layout,
)
from .masks import (
    Mask,
    callback_mask,
    causal_mask,
    chunk_mask,
    dense_mask,
    fixed_mask,
    local_mask,
    sink_mask,
    strided_mask,
)

__version__ = "0.1.0"

# Which module has which of the names that need TensorFlow.
_TENSORFLOW_NAMES = {
    "Adam": "optimizer",
    "BlocksparseTransformer": "transformer",
    "Decoder": "generation",
    "SparseSelfAttention": "keras_layer",
    "SparseTransformer": "models",
    "attention_impl": "attention",
    "block_sparse_attention": "attention",
    "blocksparse_attention_impl": "attention",
    "generate": "generation",
    "get_attn_mask": "attention",
    "get_blocksparse_obj": "transformer",
    "get_callback": "attention",
    "load_ops": "attention",
    "merge_heads": "attention",
    "merge_states": "attention",
    "recomputable": "recompute",
    "shape_list": "attention",
    "split_heads": "attention",
    "split_states": "attention",
    "strided_transpose": "attention",
}

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "BlockMask",
    "Mask",
    "all_layout",
    "block_mask",
    "callback_mask",
    "causal_mask",
    "chunk_layout",
    "chunk_mask",
    "dense_layout",
    "dense_mask",
    "fixed_layout",
    "fixed_mask",
    "layouts",
    "local_layout",
    "local_mask",
    "mask_layout",
    "masks",
    "pattern_block_mask",
    "reference",
    "sink_layout",
    "sink_mask",
    "strided_layout",
    "strided_mask",
]
__all__ += sorted(_TENSORFLOW_NAMES)


def __getattr__(name):
    if name not in _TENSORFLOW_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"sparse_attention.{name} needs TensorFlow 1.15 or newer, which does not "
            f"import ({error}); `pip install tensorflow`"
        ) from error
    module = importlib.import_module("." + _TENSORFLOW_NAMES[name], __name__)
    return globals().setdefault(name, getattr(module, name))


def __dir__():
    return sorted({*globals(), *__all__})
