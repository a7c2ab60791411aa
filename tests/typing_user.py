"""A user's program, which mypy checks strictly (`make lint`): what is exported has types."""

from __future__ import annotations

import numpy as np

import sparse_attention as sa


def block_mask(length: int, window: int) -> sa.BlockMask:
    mask: sa.Mask = sa.local_mask(window) | (sa.sink_mask(4) & sa.causal_mask())
    layout: np.ndarray = sa.mask_layout(mask, length, block_size=32)
    return sa.BlockMask(layout, mask, block_size=32, q_len=length)


def attend(x: np.ndarray) -> float:
    plan = sa.pattern_block_mask("fixed", 512, heads=4, local_attn_ctx=128)
    o = sa.block_sparse_attention(x, x, x, plan, heads=4, kv_lengths=[512, 100])
    dense = sa.attention_impl(x, x, x, 4, "fixed", local_attn_ctx=128)
    sa.clear_plans()
    return float(np.abs(np.array(o) - np.array(dense)).max()) * plan.density


def train() -> dict:
    sa.load_ops(blocksparse_ops=True)
    layer = sa.SparseSelfAttention(heads=4, attn_mode="local", local_attn_ctx=32)
    model = sa.SparseTransformer(256, time=128, layers=2, width=64, heads=4)
    decoder = sa.Decoder(model, batch=2)
    tokens, statistics = sa.generate(decoder, [[1, 2, 3], [4]], length=5, top_p=0.9)
    sa.enable_flash_attention()
    sa.disable_flash_attention()
    with sa.flash_attention(), sa.portable_graph():
        sa.sparsify(model, "local", where=lambda layer: True, local_attn_ctx=64)
    return {**layer.get_config(), "tokens": tokens, "statistics": statistics}
