"""The patterns of the Sparse Transformer: one table, which everything else reads.

A new pattern is a function for its layout, one for its mask, and a line in `PATTERNS`.
The fused op, OpenAI's three ops, the Keras layer and model, the build command and the
examples then know it by its name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, NamedTuple

from .block_mask import BlockMask
from .checks import as_ints, check_positive
from .images import merged_layout, merged_mask
from .layouts import all_layout, fixed_layout, local_layout, strided_layout
from .masks import (
    VERTSIZE,
    causal_mask,
    choose_num_verts,
    fixed_mask,
    local_mask,
    strided_mask,
)


class Settings(NamedTuple):
    """What a pattern is made for; `pattern_block_mask` says what each number means.

    Of the last three, those that the pattern does not need are None.
    """

    q_len: int
    heads: int
    block_size: int
    local_attn_ctx: int | None
    num_verts: int | None
    vertsize: int | None


class Pattern(NamedTuple):
    """How to make a pattern. The functions take `Settings`."""

    layout: Callable  # -> bool [heads or 1, q_blocks, kv_blocks], in positions
    mask: Callable  # -> `Mask`, in rows
    needs: tuple[str, ...] = ("local_attn_ctx",)  # which of the last three settings
    row_stride: Callable | None = None  # -> that of `BlockMask`; None: always 1

    def row_stride_of(self, settings):
        return 1 if self.row_stride is None else self.row_stride(settings)


def _stride(settings):
    """From q_len on all strides are alike: every query attends to itself alone."""
    return min(settings.local_attn_ctx, settings.q_len)


PATTERNS = {
    "all": Pattern(
        lambda s: all_layout(s.q_len, s.block_size), lambda s: causal_mask(), needs=()
    ),
    "local": Pattern(
        lambda s: local_layout(s.q_len, s.block_size, s.local_attn_ctx),
        lambda s: local_mask(s.local_attn_ctx),
    ),
    "strided": Pattern(
        lambda s: strided_layout(s.q_len, s.block_size, _stride(s)),
        lambda s: strided_mask(_stride(s)),
        row_stride=_stride,
    ),
    "fixed": Pattern(
        lambda s: fixed_layout(
            *(s.q_len, s.block_size, s.local_attn_ctx, s.num_verts, s.vertsize),
            heads=s.heads,
        ),
        lambda s: fixed_mask(s.local_attn_ctx, s.block_size, s.num_verts, s.vertsize),
        needs=("local_attn_ctx", "num_verts", "vertsize"),
    ),
    "merged": Pattern(
        lambda s: merged_layout(s.q_len, s.block_size, _stride(s)),
        lambda s: merged_mask(_stride(s)),
    ),
}

# What the paper calls a dense and a strided model: the patterns of its layers in turn, as
# `SparseTransformer` takes them.
PAPERS_MODELS = {"dense": "all", "strided": "local,strided"}


def check_known(attn_mode: str, known: Any = None) -> None:
    """Raises ValueError unless `known`, or else the table, has a pattern of that name.

    >>> check_known("dense")
    Traceback (most recent call last):
    ValueError: attn_mode must be 'all', 'local', 'strided', 'fixed' or 'merged', got 'dense'
    """
    known = PATTERNS if known is None else known
    if not isinstance(attn_mode, str) or attn_mode not in known:
        *names, last = map(repr, known)
        raise ValueError(
            f"attn_mode must be {', '.join(names)} or {last}, got {attn_mode!r}"
        )


def layer_patterns(attention: str | None) -> list:
    """The names of the patterns that a model's layers have in turn.

    >>> layer_patterns("dense, local")
    ['all', 'local']

    Args:
      attention: The names with commas between; "dense" is another word for "all".

    Raises:
      TypeError: If `attention` is no str.
      ValueError: If there is no such pattern.
    """
    if not isinstance(attention, str):
        raise TypeError(
            f"attention must be a str, patterns with commas between, got {attention!r}"
        )
    names = [name.strip() for name in attention.split(",")]
    names = ["all" if name == "dense" else name for name in names]
    for name in names:
        check_known(name)
    return names


def resolve(
    attn_mode,
    q_len,
    heads,
    block_size=32,
    local_attn_ctx=None,
    num_verts=None,
    vertsize=None,
):
    """The `Pattern` and the `Settings` that `pattern_block_mask`'s arguments mean.

    Raises:
      ValueError: If the pattern is unknown, or an argument that it needs is missing or
        not positive.
    """
    check_known(attn_mode)
    pattern = PATTERNS[attn_mode]
    sizes = as_ints(
        q_len=q_len,
        heads=heads,
        block_size=block_size,
        local_attn_ctx=local_attn_ctx,
        num_verts=num_verts,
        vertsize=VERTSIZE if vertsize is None else vertsize,
    )
    for name in ("local_attn_ctx", "num_verts", "vertsize"):
        if name not in pattern.needs:
            sizes[name] = None
    required = {"q_len", "heads", "block_size", *pattern.needs}
    if num_verts is None:
        required.discard("num_verts")
    check_positive(**{name: sizes[name] for name in sizes if name in required})
    if num_verts is None and "num_verts" in pattern.needs:
        sizes["num_verts"] = choose_num_verts(
            heads, sizes["local_attn_ctx"], block_size, sizes["vertsize"]
        )
    return pattern, Settings(**sizes)


def pattern_block_mask(
    attn_mode: str,
    q_len: int,
    heads: int,
    block_size: int = 32,
    local_attn_ctx: int | None = None,
    num_verts: int | None = None,
    vertsize: int | None = None,
) -> BlockMask:
    """The plan of one of the Sparse Transformer's patterns, which are all causal.

    Equal arguments give the same object, as long as it is among the last 32.

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
      attn_mode: A name of `PATTERNS`: "all", "local", "strided", "fixed" or "merged", in
        which each head has what local and strided have.
      q_len: Sequence length in positions.
      heads: Attention heads; only "fixed" tells them apart.
      block_size: Side of a block in positions: 8, 16, 32, 64 or 128.
      local_attn_ctx: The window of "local" and "fixed", the stride of "strided", both for
        "merged", in positions; unused by "all".
      num_verts: Different summary columns among the heads of "fixed"; None: as many as
        divide the heads and fit a window, at most 4.
      vertsize: Blocks in a summary column of "fixed"; None: 1.

    Returns:
      `BlockMask`.

    Raises:
      ValueError: If an argument is missing, no positive integer, or does not fit the
        others.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, sections 4.2, 4.3 and 5.1.
    """
    return _block_mask(
        *resolve(
            attn_mode, q_len, heads, block_size, local_attn_ctx, num_verts, vertsize
        )
    )


@lru_cache(maxsize=32)
def _block_mask(pattern, settings):
    layout, mask = pattern.layout(settings), pattern.mask(settings)
    q_len, row_stride = settings.q_len, pattern.row_stride_of(settings)
    return BlockMask(layout, mask, settings.block_size, q_len, q_len, row_stride)


def clear() -> None:
    """Forgets the plans that are cached."""
    _block_mask.cache_clear()
