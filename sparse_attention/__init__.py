"""Block-sparse fused attention for TensorFlow.

    import sparse_attention as sa

    block_mask = sa.BlockMask(sa.local_layout(1024, 64, 256), sa.local_mask(256), 64)
    o = sa.block_sparse_attention(q, k, v, block_mask, heads=8)

What builds plans needs NumPy alone; TensorFlow is imported when something that runs on
it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .keras import registration as _registration
from .plan import block_mask, layouts, masks, reference
from .plan.bigbird import bigbird_layout
from .plan.block_mask import EMPTY, FULL, PARTIAL, BlockMask
from .plan.deepspeed import (
    deepspeed_bigbird_layout,
    deepspeed_bslongformer_layout,
    deepspeed_fixed_layout,
    deepspeed_variable_layout,
)
from .plan.images import (
    merged_layout,
    merged_mask,
    neighborhood_layout,
    neighborhood_mask,
    row_column_layout,
    row_column_mask,
)
from .plan.layouts import (
    all_layout,
    chunk_layout,
    dense_layout,
    fixed_layout,
    local_layout,
    mask_layout,
    sink_layout,
    strided_layout,
)
from .plan.longformer import longformer_layout, longformer_mask
from .plan.masks import (
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
from .plan.patterns import pattern_block_mask
from .plan.tokens import (
    documents_layout,
    documents_mask,
    global_layout,
    global_mask,
    prefix_layout,
    prefix_mask,
)
from .plan.windows import window_layout, window_mask

if TYPE_CHECKING:
    from .compat.attention import (
        attention_impl,
        blocksparse_attention_impl,
        get_attn_mask,
        get_callback,
        merge_heads,
        merge_states,
        shape_list,
        split_heads,
        split_states,
        strided_transpose,
    )
    from .compat.ops import load_ops
    from .compat.transformer import BlocksparseTransformer, get_blocksparse_obj
    from .keras.attention_layers import GroupQueryAttention, MultiHeadAttention
    from .keras.flash_attention import (
        disable_flash_attention,
        enable_flash_attention,
        flash_attention,
    )
    from .keras.generation import Decoder, generate
    from .keras.layers import SparseSelfAttention
    from .keras.model import SparseTransformer
    from .keras.sparsify import sparsify
    from .ops.attention import block_sparse_attention
    from .ops.plan_tensors import clear_plans
    from .ops.portable import portable_graph
    from .ops.positions import alibi_slopes, rotary_embedding
    from .ops.recompute import recomputable

__version__ = "0.2.0"

# Which module has which of the names that need TensorFlow.
_TENSORFLOW_NAMES = {
    "BlocksparseTransformer": "compat.transformer",
    "Decoder": "keras.generation",
    "GroupQueryAttention": "keras.attention_layers",
    "MultiHeadAttention": "keras.attention_layers",
    "SparseSelfAttention": "keras.layers",
    "SparseTransformer": "keras.model",
    "alibi_slopes": "ops.positions",
    "attention_impl": "compat.attention",
    "block_sparse_attention": "ops.attention",
    "blocksparse_attention_impl": "compat.attention",
    "clear_plans": "ops.plan_tensors",
    "disable_flash_attention": "keras.flash_attention",
    "enable_flash_attention": "keras.flash_attention",
    "flash_attention": "keras.flash_attention",
    "generate": "keras.generation",
    "get_attn_mask": "compat.attention",
    "get_blocksparse_obj": "compat.transformer",
    "get_callback": "compat.attention",
    "load_ops": "compat.ops",
    "merge_heads": "compat.attention",
    "merge_states": "compat.attention",
    "portable_graph": "ops.portable",
    "recomputable": "ops.recompute",
    "rotary_embedding": "ops.positions",
    "shape_list": "compat.attention",
    "sparsify": "keras.sparsify",
    "split_heads": "compat.attention",
    "split_states": "compat.attention",
    "strided_transpose": "compat.attention",
}

__all__ = [
    "BlockMask",
    "EMPTY",
    "FULL",
    "Mask",
    "PARTIAL",
    "all_layout",
    "bigbird_layout",
    "block_mask",
    "callback_mask",
    "causal_mask",
    "chunk_layout",
    "chunk_mask",
    "deepspeed_bigbird_layout",
    "deepspeed_bslongformer_layout",
    "deepspeed_fixed_layout",
    "deepspeed_variable_layout",
    "dense_layout",
    "dense_mask",
    "documents_layout",
    "documents_mask",
    "fixed_layout",
    "fixed_mask",
    "global_layout",
    "global_mask",
    "layouts",
    "local_layout",
    "local_mask",
    "longformer_layout",
    "longformer_mask",
    "mask_layout",
    "masks",
    "merged_layout",
    "merged_mask",
    "neighborhood_layout",
    "neighborhood_mask",
    "pattern_block_mask",
    "prefix_layout",
    "prefix_mask",
    "reference",
    "row_column_layout",
    "row_column_mask",
    "sink_layout",
    "sink_mask",
    "strided_layout",
    "strided_mask",
    "window_layout",
    "window_mask",
]
__all__ += sorted(_TENSORFLOW_NAMES)

_registration.watch()


def __getattr__(name: str) -> Any:
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


def __dir__() -> list:
    return sorted({*globals(), *__all__})
