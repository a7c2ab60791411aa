"""Two patterns that the library does not have, added as its own are.

`dilated` differs between heads. `other_rows` visits the even rows first, then the odd ones.
"""

import sys

import numpy as np

from sparse_attention import build
from sparse_attention.native import libraries
from sparse_attention.plan.block_mask import in_positions
from sparse_attention.plan.layouts import local_layout, mask_layout
from sparse_attention.plan.masks import Mask, local_mask, strided_mask
from sparse_attention.plan.patterns import PATTERNS, Pattern


def dilated_layout(settings):
    _, heads, block_size, window, *_ = settings
    return local_layout(settings.q_len, block_size, window, heads)


def dilated_mask(settings):
    spread = Mask(lambda head, q_idx, kv_idx: (q_idx - kv_idx) % (1 + head % 2) == 0)
    return local_mask(settings.local_attn_ctx) & spread


def other_rows_layout(settings):
    mask = in_positions(other_rows_mask(settings), settings.q_len, 2)
    return mask_layout(mask, settings.q_len, settings.block_size)


def other_rows_mask(settings):
    return local_mask(settings.local_attn_ctx) & strided_mask(2)


NEW_PATTERNS = {
    "dilated": Pattern(dilated_layout, dilated_mask),
    "other_rows": Pattern(other_rows_layout, other_rows_mask, row_stride=lambda s: 2),
}


def new_rule(name, q_len, heads, window):
    """bool [heads, q_len, q_len], True = attend: a pattern, written out."""
    i, j = np.arange(q_len)[:, None], np.arange(q_len)
    is_near = (0 <= i - j) & (i - j < window)
    if name == "merged":
        is_near |= (i >= j) & ((i - j) % window == 0)
        return np.broadcast_to(is_near, [heads, q_len, q_len])
    steps = [1 + h % 2 if name == "dilated" else 2 for h in range(heads)]
    return np.stack([is_near & ((i - j) % step == 0) for step in steps])


def build_new(core, name):
    """What the build command returns, in a process that has the new patterns."""
    PATTERNS.update(NEW_PATTERNS)
    sys.modules["tensorflow"] = None  # does not import
    libraries.build_core = lambda: core.library._name
    return build.main(
        f"--arch sm_80 --dtype float16 --block-size 32 --pattern {name}".split()
    )
