"""The patterns of the Sparse Transformer."""

from functools import lru_cache

from .block_mask import BlockMask
from .checks import check_positive
from .layouts import all_layout, fixed_layout, local_layout, strided_layout
from .masks import causal_mask, fixed_mask, local_mask, strided_mask


@lru_cache(maxsize=32)
def pattern_block_mask(
    attn_mode,
    q_len,
    heads,
    block_size=32,
    local_attn_ctx=None,
    num_verts=None,
    vertsize=None,
):
    """The plan of one of the Sparse Transformer's patterns; cached.

    >>> pattern_block_mask("fixed", 128, 2, 16, local_attn_ctx=32, num_verts=2)
    BlockMask(q_len=128, kv_len=128, block_size=16, heads=2, density 38 %)
    ▒·······  ▒·······
    █▒······  █▒······
    ·█▒·····  █·▒·····
    ·██▒····  █·█▒····
    ·█·█▒···  █·█·▒···
    ·█·██▒··  █·█·█▒··
    ·█·█·█▒·  █·█·█·▒·
    ·█·█·██▒  █·█·█·█▒

    Args:
      attn_mode: "all", "local", "strided" or "fixed".
      q_len: Sequence length in positions.
      heads: Attention heads; only "fixed" tells them apart.
      block_size: Side of a block in positions: 8, 16, 32, 64 or 128.
      local_attn_ctx: The window of "local" and "fixed", the stride of "strided", in
        positions; unused by "all".
      num_verts: Different summary columns among the heads of "fixed"; None: 4.
      vertsize: Blocks in a summary column of "fixed"; None: 1.

    Returns:
      `BlockMask`.

    Raises:
      ValueError: If an argument is missing, not positive, or does not fit the others.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 4.2.
    """
    if attn_mode not in ("all", "local", "strided", "fixed"):
        raise ValueError(
            f"attn_mode must be 'all', 'local', 'strided' or 'fixed', got {attn_mode!r}"
        )
    check_positive(q_len=q_len, heads=heads, block_size=block_size)
    if attn_mode != "all":
        check_positive(local_attn_ctx=local_attn_ctx)
    row_stride = 1
    if attn_mode == "all":
        layout, mask = all_layout(q_len, block_size), causal_mask()
    elif attn_mode == "local":
        layout = local_layout(q_len, block_size, local_attn_ctx)
        mask = local_mask(local_attn_ctx)
    elif attn_mode == "strided":
        row_stride = min(local_attn_ctx, q_len)  # from q_len on, all strides are alike
        layout = strided_layout(q_len, block_size, row_stride)
        mask = strided_mask(row_stride)
    else:
        num_verts = 4 if num_verts is None else num_verts
        vertsize = 1 if vertsize is None else vertsize
        layout = fixed_layout(
            q_len, block_size, local_attn_ctx, num_verts, vertsize, heads
        )
        mask = fixed_mask(local_attn_ctx, block_size, num_verts, vertsize)
    return BlockMask(layout, mask, block_size, q_len, q_len, row_stride)
