"""The CUDA kernels on one GPU, beside what PyTorch users have.

    python benchmarks/gpu_kernels.py [--peers] [--out FOLDER]

Milliseconds are medians of CUDA-event times over 0.2 s, after 50 ms of warm-up, with L2
flushed before each (triton.testing.do_bench). TFLOP/s count unmasked pairs only. Every
shape is checked against dense float32 in one head before it is timed.

Floors on an H100 (3.0 TB/s copied, 750 TFLOP/s bf16 multiplied), batch 4, T 16,384,
16 heads x 64, l = 128, in ms:

               forward                        backward
             bytes   matmul of pairs        bytes   5 matmuls of pairs (we do 7)
    all      0.18    2.9                    0.40    7.3  (10.3)
    local    0.18    0.05                   0.40    0.11 (0.16)
    strided  0.18    0.02                   0.40    0.06 (0.08)
    fixed    0.18    0.75                   0.40    1.9  (2.6)

Bytes: q, k, v, o once; backward q, k, v, o, do read and dq, dk, dv written once. Our
three backward kernels move 0.6 ms' worth: delta reads o, do; dq reads q, k, v, do; dkv
reads them again. What was tried is in results/gpu_kernels_h100.txt; csrc/cuda/configs.cc
chooses the tiles.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from sparse_attention import _cuda  # noqa: E402
from sparse_attention.block_mask import pattern_block_mask  # noqa: E402

# batch, T, heads, head_dim, local_attn_ctx
SHAPES = [(4, 16384, 16, 64, 128), (4, 16384, 8, 128, 128), (1, 65536, 8, 64, 256)]
MODES = {"all": 64, "local": 32, "strided": 32, "fixed": 32}  # mode: block_size


def block_mask_of(mode, length, heads, context, block_size=None):
    return pattern_block_mask(
        mode,
        length,
        heads,
        block_size or MODES[mode],
        None if mode == "all" else context,
        1
        if mode == "fixed"
        else None,  # the peers' summary: the last 32 of every window
    )


def pairs(mode, length, context):
    """Unmasked pairs of a head."""
    if mode == "all":
        return length * (length + 1) // 2
    if mode == "local":
        return length * context - context * (context - 1) // 2
    if mode == "strided":
        chunk = length // context
        return context * chunk * (chunk + 1) // 2
    windows = length // context
    own = windows * context * (context + 1) // 2
    return own + context * 32 * windows * (windows - 1) // 2


class Benchmark:
    """One shape's tensors, and the table's rows."""

    def __init__(self, core, batch, length, heads, dim, context):
        import torch
        from triton.testing import do_bench

        self.torch, self.core = torch, core
        self.batch, self.length, self.heads, self.dim = batch, length, heads, dim
        self.context = context
        torch.manual_seed(0)
        shape = batch, length, heads, dim
        self.q, self.k, self.v, self.do = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        self.median = lambda f: do_bench(f, warmup=50, rep=200, return_mode="median")
        self.rows = []

    def row(self, peer, mode, fwd=None, fwd_bwd=None, **more):
        flops = 4e-9 * self.batch * self.heads * self.dim
        flops *= pairs(mode, self.length, self.context)
        row = {"peer": peer, "mode": mode}
        row["shape"] = f"{self.batch}x{self.length}x{self.heads}x{self.dim}"
        if fwd:
            row.update(fwd_ms=round(fwd, 3), fwd_tflops=round(flops / fwd, 1))
        if fwd_bwd:
            row.update(fwdbwd_ms=round(fwd_bwd, 3))
            row.update(fwdbwd_tflops=round(3.5 * flops / fwd_bwd, 1))
        row.update(more)
        self.rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def ours(self, mode):
        """Forward, each backward kernel, and all of them; checked first."""
        import launcher

        torch = self.torch
        block_mask = block_mask_of(mode, self.length, self.heads, self.context)
        major, minor = torch.cuda.get_device_capability()
        plans = _cuda.plans(
            *(self.core.library, [major * 10 + minor], "bfloat16", [self.dim] * 2),
            *(block_mask, 1),
        )
        attention = launcher.Attention(self.core, block_mask, *plans, self.heads)
        q, k, v, do = self.q, self.k, self.v, self.do
        out = attention.forward(q, k, v)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

        def fwd():
            attention.forward(q, k, v, out=out)

        def bwd(*grads):
            attention.backward(q, k, v, *out, do, out=grads)

        def both():
            fwd()
            bwd(dq, dk, dv)

        both()
        errors = {}
        if self.length <= 16384:
            errors = self.errors(mode, out[0], dq, dk, dv)
        delta = self.median(lambda: bwd(None, None, None))
        parts = {
            "delta_ms": delta,
            "dq_ms": self.median(lambda: bwd(dq, None, None)) - delta,
            "dkv_ms": self.median(lambda: bwd(None, dk, dv)) - delta,
        }
        parts = {name: round(ms, 3) for name, ms in parts.items()}
        self.row("ours", mode, self.median(fwd), self.median(both), **parts, **errors)

    def errors(self, mode, *results):
        """Relative errors of o, dq, dk, dv in one head against dense float32."""
        torch = self.torch
        torch.backends.cuda.matmul.allow_tf32 = False
        b, h = self.batch - 1, self.heads - 1
        q, k, v, do = (x[b, :, h].float() for x in (self.q, self.k, self.v, self.do))
        i = torch.arange(self.length, device="cuda")
        query, key, window = i[:, None], i[None], self.context
        allowed = query >= key
        if mode == "local":
            allowed &= query - key < window
        elif mode == "strided":
            allowed &= (query - key) % window == 0
        elif mode == "fixed":
            allowed &= (query // window == key // window) | (
                key % window >= window - 32
            )
        scale = self.dim**-0.5
        p = torch.softmax((q @ k.T * scale).masked_fill_(~allowed, -torch.inf), 1)
        o = p @ v
        ds = p * (do @ v.T - (do * o).sum(1, keepdim=True))
        exact = o, ds @ k * scale, ds.T @ q * scale, p.T @ do
        names = "o", "dq", "dk", "dv"
        found = {}
        for name, got, want in zip(names, results, exact):
            error = (got[b, :, h].float() - want).norm() / want.norm()
            found[name + "_err"] = f"{error.item():.1e}"
            if not error < 1e-2:
                raise AssertionError(f"{mode} {name}: relative error {error}")
        return found

    def dense_peers(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = self._leaves()
        do = self.do.transpose(1, 2)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                self._time_peer(
                    backend.name.lower(),
                    "all",
                    lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
                    (q, k, v),
                    do,
                )

    def flex(self, mode):
        torch = self.torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.config.recompile_limit = 64  # one for each shape and pattern
        compiled = torch.compile(flex_attention, dynamic=False)
        window, chunk = self.context, self.length // self.context
        rules = {
            "all": lambda b, h, i, j: i >= j,
            "local": lambda b, h, i, j: (i >= j) & (i - j < window),
            "strided": lambda b, h, i, j: (i >= j) & (i // chunk == j // chunk),
            "fixed": lambda b, h, i, j: (
                (i >= j) & ((i // window == j // window) | (j % window >= window - 32))
            ),
        }
        q, k, v = self._leaves()
        blocks = create_block_mask(
            rules[mode], None, None, self.length, self.length, device="cuda"
        )
        self._time_peer(
            "flex",
            mode,
            lambda: compiled(q, k, v, block_mask=blocks),
            (q, k, v),
            self.do.transpose(1, 2),
        )

    def _leaves(self):
        return [x.transpose(1, 2).requires_grad_() for x in (self.q, self.k, self.v)]

    def _time_peer(self, peer, mode, f, leaves, do):
        def both():
            f().backward(do)
            for leaf in leaves:
                leaf.grad = None

        both()
        self.row(peer, mode, self.median(f), self.median(both))


def ceilings(torch, median):
    a, b = (
        torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    matmul = 2 * 8192**3 / median(lambda: a @ b) / 1e9
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 4 * x.numel() / median(lambda: y.copy_(x)) / 1e9
    return {"matmul_tflops": round(matmul, 1), "copy_tb_per_s": round(copy, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peers", action="store_true", help="time FlexAttention, SDPA too"
    )
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="how many of them"
    )
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=pathlib.Path, help="folder for the rows as JSON")
    options = parser.parse_args()

    import launcher
    import torch
    import triton
    from triton.testing import do_bench

    head = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    head.update(
        ceilings(torch, lambda f: do_bench(f, warmup=50, rep=200, return_mode="median"))
    )
    print(head, flush=True)
    core = launcher.load_core()
    rows = []
    for shape in SHAPES[: options.shapes]:
        benchmark = Benchmark(core, *shape)
        for mode in options.modes:
            benchmark.ours(mode)
        if options.peers:
            benchmark.dense_peers()
            for mode in options.modes:
                benchmark.flex(mode)
        rows += benchmark.rows
        if options.out:
            text = json.dumps({"head": head, "rows": rows}, indent=1)
            (options.out / "gpu_kernels.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
