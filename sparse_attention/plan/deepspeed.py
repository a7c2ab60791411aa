"""The layouts of DeepSpeed's sparse attention, by the arguments of its configurations.

| DeepSpeed | here |
|---|---|
| `FixedSparsityConfig` | `deepspeed_fixed_layout` |
| `VariableSparsityConfig` | `deepspeed_variable_layout` |
| `BSLongformerSparsityConfig` | `deepspeed_bslongformer_layout` |
| `BigBirdSparsityConfig` | `deepspeed_bigbird_layout` |

`num_heads` is `heads`, `block` is `block_size`, and `make_layout(seq_len)` is the call,
with `q_len`. DeepSpeed draws from Python's `random`; here the draws are those after
`random.seed(seed)`. Everything counts blocks, so these layouts need no mask, except where
`attention` is "unidirectional": then the blocks of the diagonal are whole, as in DeepSpeed,
and `causal_mask()` goes with them. Blocks above the diagonal, of which DeepSpeed computes
a few, are left out.
"""

from __future__ import annotations

import random
from typing import Sequence

import numpy as np

from .checks import as_list, check_not_negative, check_positive


def deepspeed_fixed_layout(
    q_len: int,
    block_size: int,
    heads: int = 1,
    num_local_blocks: int = 4,
    num_global_blocks: int = 1,
    attention: str = "bidirectional",
    horizontal_global_attention: bool = False,
    num_different_global_patterns: int = 1,
    different_layout_per_head: bool = False,
) -> np.ndarray:
    """Windows of blocks, and the last blocks of each window for everybody.

    >>> deepspeed_fixed_layout(96, 16, num_local_blocks=2)[0].astype(int)
    array([[1, 1, 0, 1, 0, 1],
           [1, 1, 0, 1, 0, 1],
           [0, 1, 1, 1, 0, 1],
           [0, 1, 1, 1, 0, 1],
           [0, 1, 0, 1, 1, 1],
           [0, 1, 0, 1, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      heads: Attention heads.
      num_local_blocks: Blocks in a window.
      num_global_blocks: Blocks of each window that everybody sees.
      attention: "bidirectional" or "unidirectional".
      horizontal_global_attention: Whether these blocks see everybody, too.
      num_different_global_patterns: Head h mod this takes the last blocks of a window
        (0), those before (1), and so on.
      different_layout_per_head: Must be True for more than one pattern.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Where "unidirectional", pair with `causal_mask()`.

    Raises:
      ValueError: If a size is not a positive integer, `attention` is unknown, or the
        arguments do not fit each other.
    """
    n = _blocks(q_len, block_size, heads)
    check_positive(
        num_local_blocks=num_local_blocks,
        num_global_blocks=num_global_blocks,
        num_different_global_patterns=num_different_global_patterns,
    )
    _check_attention(attention, horizontal_global_attention)
    if num_local_blocks % num_global_blocks:
        raise ValueError(
            f"num_global_blocks must divide num_local_blocks={num_local_blocks}, "
            f"got {num_global_blocks}"
        )
    patterns = num_local_blocks // num_global_blocks
    if num_different_global_patterns > patterns:
        raise ValueError(
            f"num_different_global_patterns must be at most {patterns}, num_local_blocks "
            f"/ num_global_blocks, got {num_different_global_patterns}"
        )
    if num_different_global_patterns > 1 and not different_layout_per_head:
        raise ValueError(
            "num_different_global_patterns must be 1 without different_layout_per_head="
            f"True, got {num_different_global_patterns}"
        )
    window = np.arange(n) // num_local_blocks
    layouts = []
    for pattern in range(num_different_global_patterns):
        first = num_local_blocks - (1 + pattern) * num_global_blocks
        # A last window that is too short has those at the end of the sequence.
        start = np.arange(first, n + first, num_local_blocks)
        start = np.clip(start, 0, max(0, n - num_global_blocks))
        is_global = np.zeros(n, bool)
        for shift in range(min(n, num_global_blocks)):
            is_global[start + shift] = True
        layout = window[:, None] == window
        layouts.append(_with_global(layout, is_global, horizontal_global_attention))
    return _finished(layouts, heads, attention)


def deepspeed_variable_layout(
    q_len: int,
    block_size: int,
    heads: int = 1,
    num_random_blocks: int = 0,
    local_window_blocks: Sequence[int] = (4,),
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] | None = None,
    attention: str = "bidirectional",
    horizontal_global_attention: bool = False,
    different_layout_per_head: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Windows of given sizes, blocks for everybody, and blocks at random.

    >>> deepspeed_variable_layout(96, 16, local_window_blocks=[1, 2])[0].astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 0, 0, 1, 1, 0],
           [1, 0, 0, 1, 1, 0],
           [1, 0, 0, 0, 0, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      heads: Attention heads.
      num_random_blocks: Blocks at random for each row of blocks.
      local_window_blocks: Blocks of the first window, the second, ...; all further ones
        are like the last.
      global_block_indices: Blocks that everybody sees; those past the end do not count.
      global_block_end_indices: None, or for each of them where a range ends that begins
        there; the end is not part of it.
      attention: "bidirectional" or "unidirectional".
      horizontal_global_attention: Whether the global blocks see everybody, too.
      different_layout_per_head: Whether heads have random blocks of their own.
      seed: Of the random blocks.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Where "unidirectional", pair with `causal_mask()`.

    Raises:
      ValueError: If a size is not a positive integer, `attention` is unknown, or the
        arguments do not fit each other.
    """
    n = _blocks(q_len, block_size, heads)
    _check_attention(attention, horizontal_global_attention)
    is_global = _global_blocks(n, global_block_indices, global_block_end_indices)
    sizes = as_list("local_window_blocks", local_window_blocks)
    if not sizes:
        raise ValueError("local_window_blocks must have a size, got none")
    for size in sizes:
        check_positive(local_window_blocks=size)
    sizes += [sizes[-1]] * (-(-n // sizes[-1]))  # as many as could be needed
    window = np.repeat(np.arange(len(sizes)), np.minimum(sizes, n))[:n]
    local = window[:, None] == window
    drawn = _random_layouts(
        *(n, num_random_blocks, heads if different_layout_per_head else 1, seed),
        past_only=False,
    )
    layouts = [
        _with_global(local | one, is_global, horizontal_global_attention)
        for one in drawn
    ]
    return _finished(layouts, heads, attention)


def deepspeed_bslongformer_layout(
    q_len: int,
    block_size: int,
    heads: int = 1,
    num_sliding_window_blocks: int = 3,
    global_block_indices: Sequence[int] = (0,),
    global_block_end_indices: Sequence[int] | None = None,
    attention: str = "bidirectional",
) -> np.ndarray:
    """Longformer in whole blocks: a sliding window, and blocks that see and are seen.

    >>> deepspeed_bslongformer_layout(96, 16, global_block_indices=[1])[0].astype(int)
    array([[1, 1, 0, 0, 0, 0],
           [1, 1, 1, 1, 1, 1],
           [0, 1, 1, 1, 0, 0],
           [0, 1, 1, 1, 1, 0],
           [0, 1, 0, 1, 1, 1],
           [0, 1, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      heads: Attention heads, which all have the same layout.
      num_sliding_window_blocks: Blocks in the window; an even number is as good as the
        next odd one.
      global_block_indices: Blocks that see all and that all see; those past the end do
        not count.
      global_block_end_indices: None, or for each of them where a range ends that begins
        there; the end is not part of it.
      attention: "bidirectional" or "unidirectional".

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Where "unidirectional", pair with `causal_mask()`.

    Raises:
      ValueError: If a size is not a positive integer, `attention` is unknown, or the
        arguments do not fit each other.
    """
    n = _blocks(q_len, block_size, heads)
    _check_attention(attention)
    is_global = _global_blocks(n, global_block_indices, global_block_end_indices)
    layout = _with_global(_sliding(n, num_sliding_window_blocks), is_global, True)
    return _finished([layout], heads, attention)


def deepspeed_bigbird_layout(
    q_len: int,
    block_size: int,
    heads: int = 1,
    num_random_blocks: int = 1,
    num_sliding_window_blocks: int = 3,
    num_global_blocks: int = 1,
    attention: str = "bidirectional",
    different_layout_per_head: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """A sliding window, the first blocks, which see and are seen, and blocks at random.

    >>> deepspeed_bigbird_layout(96, 16, num_random_blocks=1, seed=3)[0].astype(int)
    array([[1, 1, 1, 1, 1, 1],
           [1, 1, 1, 0, 1, 0],
           [1, 1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1, 0],
           [1, 0, 1, 1, 1, 1],
           [1, 0, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      heads: Attention heads.
      num_random_blocks: Blocks at random for each row of blocks; they may be among the
        others. In "unidirectional" attention they are drawn from those before.
      num_sliding_window_blocks: Blocks in the window; an even number is as good as the
        next odd one.
      num_global_blocks: Blocks at the start that see all and that all see.
      attention: "bidirectional" or "unidirectional".
      different_layout_per_head: Whether heads have random blocks of their own.
      seed: Of the random blocks.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Where "unidirectional", pair with `causal_mask()`.

    Raises:
      ValueError: If a size is not a positive integer, `attention` is unknown, or there
        are fewer blocks than one of the numbers.

    `bigbird_layout` has the blocks of Hugging Face's `BigBirdModel`.
    """
    n = _blocks(q_len, block_size, heads)
    _check_attention(attention)
    _check_fits(n, num_global_blocks=num_global_blocks)
    is_global = np.arange(n) < num_global_blocks
    window = _sliding(n, num_sliding_window_blocks)
    drawn = _random_layouts(
        *(n, num_random_blocks, heads if different_layout_per_head else 1, seed),
        past_only=attention == "unidirectional",
    )
    layouts = [_with_global(window | one, is_global, True) for one in drawn]
    return _finished(layouts, heads, attention)


# ---- parts ----


def _blocks(q_len, block_size, heads):
    check_positive(q_len=q_len, block_size=block_size, heads=heads)
    return -(-q_len // block_size)


def _check_attention(attention, horizontal_global_attention=False):
    if attention not in ("unidirectional", "bidirectional"):
        raise ValueError(
            f"attention must be 'unidirectional' or 'bidirectional', got {attention!r}"
        )
    if horizontal_global_attention and attention == "unidirectional":
        raise ValueError(
            "horizontal_global_attention must be False where attention='unidirectional', "
            f"got {horizontal_global_attention!r}"
        )


def _check_fits(n, **counts):
    for name, count in counts.items():
        check_not_negative(**{name: count})
        if count > n:
            raise ValueError(f"{name} must be at most the {n} blocks, got {count}")


def _sliding(n, num_sliding_window_blocks):
    _check_fits(n, num_sliding_window_blocks=num_sliding_window_blocks)
    block = np.arange(n)
    return abs(block[:, None] - block) <= num_sliding_window_blocks // 2


def _global_blocks(n, starts, ends):
    """bool [n]: the blocks that global_block_indices and .._end_indices name."""
    starts = as_list("global_block_indices", starts)
    for start in starts:
        check_not_negative(global_block_indices=start)
    if ends is None:
        ends = [start + 1 for start in starts]
    ends = as_list("global_block_end_indices", ends)
    if len(ends) != len(starts):
        raise ValueError(
            f"global_block_end_indices must have {len(starts)} numbers, as "
            f"global_block_indices has, got {len(ends)}"
        )
    is_global = np.zeros(n, bool)
    for start, end in zip(starts, ends):
        check_positive(global_block_end_indices=end)
        if end <= start:
            raise ValueError(
                "global_block_end_indices must be above global_block_indices, got "
                f"{end} for {start}"
            )
        is_global[start:end] = True
    return is_global


def _random_layouts(n, count, heads, seed, past_only):
    """bool [heads, n, n]: in each row, `count` different blocks; as many as there are."""
    _check_fits(n, num_random_blocks=count)
    check_not_negative(seed=seed)
    draws = random.Random(seed)
    layout = np.zeros((heads, n, n), bool)
    for head in range(heads):
        for row in range(n):
            choices = range(row + 1 if past_only else n)
            layout[head, row, draws.sample(choices, min(count, len(choices)))] = True
    return layout


def _with_global(layout, is_global, is_horizontal):
    """All see the global blocks; these see all, too, where `is_horizontal`."""
    return layout | is_global | (is_global[:, None] & is_horizontal)


def _finished(layouts, heads, attention):
    """The layouts that the heads take in turn, as one for each head."""
    layout = np.stack(layouts)[np.arange(heads) % len(layouts)]
    return np.tril(layout) if attention == "unidirectional" else layout
