"""attention_bwd_sm90 beside the kernels that it replaces, and beside cuDNN, on one H100 or H200.

    python benchmarks/gpu_backward.py             # shapes x modes, some minutes
    python benchmarks/gpu_backward.py --check     # small shapes: what differs, and where
    python benchmarks/gpu_backward.py --profile   # of each shape, ms of every kernel
    python benchmarks/gpu_backward.py --dims 72 80 96 112   # heads of these dims alone

One process, one library. A call for dq alone and one for dk and dv run attention_bwd_dq and
attention_bwd_dkv; a call for all three runs the new kernel where lists are long. "before" is
the sum of the two calls less one attention_bwd_delta. Rounds take turns, with L2 flushed
before every run; ms are medians of the rounds' medians. `differ` is the largest difference
to the kernels before, relative to their largest element; `bits` whether 20 more calls gave
the same ones. The last columns are of the forward pass, ours and cuDNN's.
"""

import argparse
import functools
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import launcher  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from sparse_attention.native import abi  # noqa: E402
from sparse_attention.plan.patterns import pattern_block_mask  # noqa: E402

SHAPES = [  # batch, q_len, heads, head_dim
    *((4, 16384, 16, 64), (4, 16384, 8, 128), (2, 8192, 16, 64), (2, 8192, 16, 128)),
    *((16, 2048, 16, 64), (16, 2048, 16, 128)),
]
CHECKED = [(1, 2048, 1, 64), (2, 4096, 2, 64), (1, 2048, 1, 128), (2, 3000, 3, 128)]
MODES = {  # block_size, local_attn_ctx
    "all": (64, 128),
    "fixed": (32, 128),
    "local": (32, 1024),
}
ROUNDS = 3


class Shape:
    def __init__(self, core, mode, batch, q_len, heads, head_dim):
        torch.manual_seed(0)
        self.q, self.k, self.v, self.do = (
            torch.randn(
                (batch, q_len, heads, head_dim), device="cuda", dtype=torch.bfloat16
            )
            for _ in range(4)
        )
        block_size, window = MODES[mode]
        block_mask = pattern_block_mask(mode, q_len, heads, block_size, window, 1)
        plans = abi.plans(core.library, [90], "bfloat16", [head_dim] * 2, block_mask, 1)
        self.kv_tiles = plans[1]
        self.attention = launcher.Attention(core, block_mask, *plans, heads)
        self.out = self.attention.forward(self.q, self.k, self.v)

    def backward(self, *out):
        return self.attention.backward(
            self.q, self.k, self.v, *self.out, self.do, out=out
        )

    def gradients(self):
        return [torch.full_like(x, float("nan")) for x in (self.q, self.k, self.v)]

    def queries(self):
        """In a list, on average."""
        tiles = len(self.kv_tiles.q_indptr) - 1
        return len(self.kv_tiles.q_indices) * self.kv_tiles.block_size // tiles

    def check(self):
        before, now = self.gradients(), self.gradients()
        self.backward(before[0], None, None)
        self.backward(None, *before[1:])
        self.backward(*now)
        torch.cuda.synchronize()
        differ = [
            ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()
            for x, y in zip(now, before)
        ]
        bits = True
        for _ in range(20):
            again = self.gradients()
            self.backward(*again)
            bits &= all(torch.equal(x, y) for x, y in zip(again, now))
        return before, now, differ, bits

    def cudnn(self):
        """A call of cuDNN's forward, and one of its backward."""
        leaves = [
            x.transpose(1, 2).detach().requires_grad_()
            for x in (self.q, self.k, self.v)
        ]

        def forward():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(*leaves, is_causal=True)

        o = forward()
        return forward, lambda: torch.autograd.grad(
            o, leaves, self.do.transpose(1, 2), retain_graph=True
        )


def show_where(before, now, tile=128):
    """Tiles of rows that differ, of the first sequence and head."""
    for name, x, y in zip(("dq", "dk", "dv"), now, before):
        gap = (x - y)[0, :, 0].float().abs()
        largest = y[0, :, 0].float().abs().max()
        rows = torch.nan_to_num(gap, nan=torch.inf).amax(1) / largest
        tiles = [f"{t.max().item():.0e}" for t in rows.split(tile)]
        columns = torch.nan_to_num(gap, nan=torch.inf).amax(0).split(16)
        columns = [f"{(c.max() / largest).item():.0e}" for c in columns]
        print(f"    {name} by {tile} rows: {' '.join(tiles)}; by 16 columns:", *columns)


def check(core, shapes):
    for sizes in shapes:
        for mode in MODES:
            shape = Shape(core, mode, *sizes)
            before, now, differ, bits = shape.check()
            print(
                f"{'x'.join(map(str, sizes)):>14} {mode:6} {shape.queries():6} queries a "
                f"list; differ {' '.join(f'{d:.1e}' for d in differ)}, bits {bits}",
                flush=True,
            )
            if not (bits and max(differ) < 0.02):
                show_where(before, now)


def profile(core, modes, shapes):
    for sizes in shapes:
        for mode in modes:
            shape = Shape(core, mode, *sizes)
            gradients = shape.gradients()
            shape.backward(*gradients)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(5):
                    shape.backward(*gradients)
                torch.cuda.synchronize()
            print("x".join(map(str, sizes)), mode)
            for row in profiler.key_averages():
                print(f"    {row.key:40} {row.device_time / 1e3:8.3f}", flush=True)


def measure(core, modes, shapes):
    print(
        f"{'shape':16} {'mode':6} {'queries':>7}  before    now  cuDNN  of the forward"
    )
    for sizes in shapes:
        for mode in modes:
            shape = Shape(core, mode, *sizes)
            _, _, differ, bits = shape.check()
            dq, dk, dv = shape.gradients()
            calls = {
                "delta": functools.partial(shape.backward, None, None, None),
                "dq": functools.partial(shape.backward, dq, None, None),
                "dkv": functools.partial(shape.backward, None, dk, dv),
                "now": functools.partial(shape.backward, dq, dk, dv),
                "fwd": functools.partial(
                    shape.attention.forward, shape.q, shape.k, shape.v, out=shape.out
                ),
            }
            if mode == "all":
                calls["cudnn fwd"], calls["cudnn"] = shape.cudnn()
            times = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    ms = do_bench(call, warmup=30, rep=120, return_mode="median")
                    times[name].append(ms)
            ms = {name: statistics.median(of) for name, of in times.items()}
            before = ms["dq"] + ms["dkv"] - ms["delta"]
            print(
                f"{'x'.join(map(str, sizes)):16} {mode:6} {shape.queries():7} "
                f"{before:7.3f} {ms['now']:6.3f} {ms.get('cudnn', 0):6.3f} {ms['fwd']:6.3f} "
                f"{ms.get('cudnn fwd', 0):6.3f}  differ {max(differ):.1e}, bits {bits}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--dims", nargs="+", type=int, help="4 x 8192 x 16 heads of each"
    )
    options = parser.parse_args()
    shapes = [(4, 8192, 16, dim) for dim in options.dims or ()] or SHAPES
    print(torch.cuda.get_device_name(), torch.__version__)
    core = launcher.load_core()
    if options.check:
        dims = [(2, 3000, 3, dim) for dim in options.dims or ()]
        check(core, dims or CHECKED)
    elif options.profile:
        profile(core, options.modes, shapes)
    else:
        measure(core, options.modes, shapes)


if __name__ == "__main__":
    main()
