"""One problem for the core, and what it makes of it; shared by tests of the core."""

import numpy as np
from helpers import RESULTS, assert_attention_close, random_inputs


class Case:
    """One problem: random arrays in a dtype, and what the core makes of them."""

    # Four in a batch: with few rows the largest error of either is a matter of luck.
    def __init__(
        self,
        core,
        block_mask,
        dtype="float32",
        kv_lengths=None,
        tile_q=None,
        batch=4,
        rule=None,
        seed=0,
        **sizes,
    ):
        self.core, self.block_mask, self.dtype = core, block_mask, dtype
        self.rule = rule or {}
        q_len, kv_len = block_mask.q_len, block_mask.kv_len
        self.arrays = random_inputs(
            seed, batch, q_len=q_len, kv_len=kv_len, dtype=dtype, **sizes
        )
        self.tiles = block_mask.tiles(tile_q)
        self.mask = block_mask.to_dense()
        self.kv_lengths = None
        if kv_lengths is not None:
            self.kv_lengths = np.array(kv_lengths, np.int32)

    def run(self, workers=1, **changed):
        """o, lse, dq, dk, dv, and drelative_bias where there is one."""
        q, k, v, do, dlse = self.arrays._replace(**changed)
        kwargs = {
            "block_mask": self.block_mask,
            "tiles": self.tiles,
            "workers": workers,
            "kv_lengths": self.kv_lengths,
            "rule": self.rule,
        }
        o, lse = self.core.fwd(q, k, v, **kwargs)
        return (o, lse) + self.core.bwd(q, k, v, o, lse, do, dlse=dlse, **kwargs)

    def check(self, workers=1):
        results = dict(zip((*RESULTS, "drelative_bias"), self.run(workers)))
        options = dict(self.rule, kv_lengths=self.kv_lengths)
        mask = self.mask & options.pop("mask", True)
        by_row = bool(self.rule)
        assert_attention_close(results, self.arrays, mask, by_row=by_row, **options)


def as_float(x):
    return np.asarray(x).astype(np.float64)


def same_bits(got, expected):
    return all(a.tobytes() == b.tobytes() for a, b in zip(got, expected))
