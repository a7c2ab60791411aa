"""Which tile shapes each CUDA kernel is compiled with: the macros of csrc/cuda/*.cu."""

import plans

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
# KiB that one CTA may use, by compute capability.
SHARED_MEMORY = {
    70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99
}  # fmt: skip


# Tiles of half as many keys pay where they list at most so many times the blocks: 1.5
# for `local` and `strided` (dkv: 0.54 for 0.61 ms, 0.49 for 0.53), 1.9 for `fixed` and
# 2 for `all`, where they cost (3.7 for 3.4 ms). Not with head_dim 128 (0.81 for 0.53).
HALF_TILE = 1.6


def shape_class(
    block_mask,
    arch,
    dtype,
    head_dim,
    head_dim_v,
    group=1,
    softmax_scale=1,
    block_q=None,
    block_kv=None,
):
    """The `ShapeClass` that a BlockMask runs as, and its plan by keys."""
    size = block_mask.block_size
    is_row_strided, is_scale_positive = block_mask.row_stride > 1, softmax_scale > 0

    def shape(block_kv):
        return ShapeClass(
            arch,
            dtype,
            head_dim,
            head_dim_v,
            size,
            is_row_strided,
            is_scale_positive,
            block_q,
            block_kv,
        )

    chosen = shape(block_kv)
    by_kv = plans.by_kv(block_mask, chosen.block_kv, group)
    may_halve = (
        chosen.block_kv == 128 and size < 128 and max(head_dim, head_dim_v) <= 64
    )
    if block_kv is None and may_halve:
        half = plans.by_kv(block_mask, 64, group)
        if len(half.indices) < HALF_TILE * len(by_kv.indices):
            return shape(64), half
    return chosen, by_kv


class ShapeClass:
    """What kernels are specialised for.

    Args:
      arch: 80 for sm_80.
      dtype: "float32", "float16" or "bfloat16".
      block_size: Of the BlockMask.
      block_q, block_kv: Tiles of the plans by queries and by keys; None: the largest up
        to 128 whose shared memory the device has.
    """

    def __init__(
        self,
        arch,
        dtype,
        head_dim,
        head_dim_v,
        block_size,
        is_row_strided=False,
        is_scale_positive=True,
        block_q=None,
        block_kv=None,
    ):
        self.arch, self.dtype, self.block_size = arch, dtype, block_size
        self.head_dim, self.head_dim_v = head_dim, head_dim_v
        self.is_row_strided, self.is_scale_positive = is_row_strided, is_scale_positive
        self.element_size = 4 if dtype == "float32" else 2
        by_q = ("attention_fwd", "attention_bwd_dq")
        self.block_q = block_q or max(block_size, min(map(self._largest_tile, by_q)))
        self.block_kv = block_kv or max(
            block_size, 32, self._largest_tile("attention_bwd_dkv")
        )

    def kernels(self, tuning=None):
        """{kernel: (macros without their prefix, bytes of shared memory)}.

        Args:
          tuning: {kernel: macros} to set otherwise.
        """
        common = {
            "DTYPE": DTYPES[self.dtype],
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "ROW_STRIDED": int(self.is_row_strided),
        }
        by_q = dict(common, BLOCK_Q=self.block_q, PLAN_KV=self.block_size)
        by_kv = dict(common, BLOCK_KV=self.block_kv, PLAN_BLOCK=self.block_size)
        fwd = dict(by_q, SCALE_POSITIVE=int(self.is_scale_positive))
        delta = {
            "DTYPE": DTYPES[self.dtype],
            "HEAD_DIM_V": self.head_dim_v,
            "ROW_STRIDED": 0,
            "WGMMA": 0,
        }
        found = {"attention_bwd_delta": (delta, 0)}
        for name, tile, macros in (
            ("attention_fwd", self.block_q, fwd),
            ("attention_bwd_dq", self.block_q, by_q),
            ("attention_bwd_dkv", self.block_kv, by_kv),
        ):
            chosen = self._tiles(name, tile, **(tuning or {}).get(name, {}))
            shared_memory = self._shared_memory(name, tile, chosen)
            macros = dict(macros, SHARED_MEMORY=shared_memory, **chosen)
            found[name] = macros, shared_memory
        return found

    def grid(self, name, macros, problem, by_q, by_kv):
        """CTAs (x, y, z) and threads of a launch."""
        if name == "attention_bwd_delta":
            vectors = self.head_dim_v * self.element_size // 16
            lanes = next(n for n in (2, 4, 8, 16, 32) if n >= vectors or n == 32)
            rows = problem.batch * problem.q_len * problem.heads
            return (-(-rows * lanes // 256), 1, 1), 256
        x, y = by_q.tiles, problem.heads
        if name == "attention_bwd_dkv":
            x, y = by_kv.tiles * macros["SPLITS"], problem.kv_heads
        return (x, y, problem.batch), macros["WARPS"] * 32

    def _largest_tile(self, name):
        tile = 128
        while tile > 16 and not self._fits(name, tile):
            tile //= 2
        return tile

    def _fits(self, name, tile):
        chosen = self._tiles(name, tile)
        return (
            self._shared_memory(name, tile, chosen) <= SHARED_MEMORY[self.arch] * 1024
        )

    def _tiles(self, name, tile, **overrides):
        is_fwd, is_dkv = name == "attention_fwd", name == "attention_bwd_dkv"
        widest = max(self.head_dim, self.head_dim_v)
        is_16_bit = self.element_size == 2
        has_wgmma = (
            self.arch == 90
            and is_16_bit
            and tile % 64 == 0
            and {self.head_dim, self.head_dim_v} <= {64, 128}
        )
        has_wgmma = overrides.get("WGMMA", has_wgmma)
        has_mma = is_16_bit and self.arch >= 80 and not has_wgmma
        # A warp of 32 rows reads half as much shared memory per product as one of 16,
        # but holds twice the accumulators: 255 registers do up to a head_dim of 64.
        is_tall = has_mma and widest <= 64 and tile >= 32
        stream = 64 if is_16_bit and widest <= 128 else 32
        sub = stream if is_fwd else 32
        if has_wgmma:
            # Two CTAs of 128 rows with head_dim 64, one with 128. Streaming 128 rows at
            # a time halves the barriers (all, fwd: 6.1 for 6.7 ms) where shared memory
            # allows two stages of them.
            stream, sub = 64 if tile == 64 or (widest > 64 and not is_fwd) else 128, 64
        chosen = {
            "WGMMA": int(has_wgmma),
            "WARPS": max(tile, 16) // (32 if is_tall else 16),
            "MIN_CTAS": 2 if has_wgmma and widest <= 64 and not is_dkv else 1,
            "STAGES": 3 if has_wgmma and stream == 64 else 2,
            "BLOCK_Q" if is_dkv else "BLOCK_KV": stream,
            "SUB_Q" if is_dkv else "SUB_KV": sub,
        }
        if is_dkv:  # the accumulators are two: share their columns
            chosen["SPLITS"] = 2 if widest * self.element_size > 256 else 1
            chosen["KV_IN_REGISTERS"] = int(has_wgmma and widest <= 64)
        else:
            chosen["Q_IN_REGISTERS"] = int(has_mma and widest <= 64)
        chosen.update(overrides)
        fits = (
            self._shared_memory(name, tile, chosen) <= SHARED_MEMORY[self.arch] * 1024
        )
        if not fits and not has_wgmma:
            side = "Q" if is_dkv else "KV"
            chosen["BLOCK_" + side] = chosen["SUB_" + side] = 32
        return chosen

    def _shared_memory(self, name, tile, chosen):
        """Bytes: `Smem::kBytes` of the kernel."""
        is_fwd, is_dkv = name == "attention_fwd", name == "attention_bwd_dkv"
        size, rows = self.element_size, max(tile, 16)
        stream, sub = (
            (chosen["BLOCK_Q"], chosen["SUB_Q"])
            if is_dkv
            else (chosen["BLOCK_KV"], chosen["SUB_KV"])
        )
        store_pitch = (-(-self.head_dim_v // 16) * 16) * size + 16
        if chosen["WGMMA"]:
            align, pitch_k, pitch_v = 1024, self.head_dim * size, self.head_dim_v * size
        else:
            align, pitch_v = 16, store_pitch
            pitch_k = (-(-self.head_dim // 16) * 16) * size + 16
        own = rows * (pitch_k + pitch_v)
        if is_fwd:
            own = rows * (pitch_k if chosen["WGMMA"] else max(pitch_k, store_pitch))
        mask_words = max(-(-rows // 32), 1)
        stage = stream * (pitch_k + pitch_v + 4 * mask_words + (8 if is_dkv else 0))
        own, stage = (-(-x // align) * align for x in (own, stage))
        has_wmma = size == 2 and self.arch < 80
        scratch = 16 * (20 * 4 + (sub + 8) * 2) if has_wmma else 0
        total = own + chosen["STAGES"] * stage + chosen["WARPS"] * scratch
        return max(total, rows * store_pitch) if is_fwd else total
