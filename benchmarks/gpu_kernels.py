"""The CUDA kernels on one GPU, beside what PyTorch users have. Started by `gpu.py`.

Milliseconds are medians of CUDA-event times over 0.2 s, after 50 ms of warm-up, with L2
flushed before each (triton.testing.do_bench). All take the same tensors, bfloat16
[batch, q_len, heads, head_dim]. Ours is checked against dense float32 in one head, up to
16,384 positions, the others against ours.

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
reads them again. What was tried is in results/gpu_kernels_h100.txt; csrc/cuda/host/configs.cc
chooses the tiles.
"""

import functools
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import gpu  # noqa: E402
import launcher  # noqa: E402
import torch  # noqa: E402
from cpu import TOLERANCE  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import (  # noqa: E402
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from sparse_attention.native import abi  # noqa: E402
from sparse_attention.plan.patterns import pattern_block_mask  # noqa: E402

LONGEST_CHECKED = 16384  # positions: dense float32 scores of one head are 1 GB


def time(f):
    quantiles = do_bench(f, warmup=50, rep=200, quantiles=[0.5, 0.1, 0.9])
    return dict(zip(("ms", "ms_low", "ms_high"), quantiles))


def rule(case):
    """The pattern as a function of query and key, by operators alone."""
    window, chunk = case.local_attn_ctx, case.q_len // case.local_attn_ctx
    return {
        "all": lambda i, j: i >= j,
        "local": lambda i, j: (i >= j) & (i - j < window),
        "strided": lambda i, j: (i >= j) & ((i - j) % window == 0),
        # What FlexAttention is given: positions that lie residue by residue.
        "strided, transposed": lambda i, j: (i >= j) & (i // chunk == j // chunk),
        # One summary block at the end of each window.
        "fixed": lambda i, j: (
            (i >= j) & ((i // window == j // window) | (j % window >= window - 32))
        ),
    }


class Bench:
    """Tensors of one shape, and the results of ours."""

    def __init__(self, core, case):
        self.core = core
        torch.manual_seed(0)
        shape = case.batch, case.q_len, case.heads, case.head_dim
        self.inputs = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        ]
        by_head = [x.transpose(1, 2) for x in self.inputs]
        self.leaves = [x.detach().requires_grad_() for x in by_head[:3]]
        self.d_output = by_head[3]

    def measure(self, case):
        results = self.ours(case)
        if case.mode == "all":
            dense = functools.partial(scaled_dot_product_attention, is_causal=True)
            for backend, name in (
                (SDPBackend.CUDNN_ATTENTION, "PyTorch cuDNN"),
                (SDPBackend.FLASH_ATTENTION, "PyTorch FlashAttention-2"),
            ):
                with sdpa_kernel(backend):
                    self.peer(case, name, dense, results)
        mode = "strided, transposed" if case.mode == "strided" else case.mode
        allowed = rule(case)[mode]
        blocks = create_block_mask(
            lambda b, h, i, j: allowed(i, j), None, None, case.q_len, case.q_len, "cuda"
        )
        flex = functools.partial(compiled_flex(), block_mask=blocks)
        self.peer(case, "FlexAttention", flex, None if "," in mode else results)

    def ours(self, case):
        """Times the forward pass, all passes, and each of the backward ones."""
        block_mask = pattern_block_mask(
            *(case.mode, case.q_len, case.heads),
            64 if case.mode == "all" else case.block_size,
            *(case.local_attn_ctx, 1),
        )
        major, minor = torch.cuda.get_device_capability()
        plans = abi.plans(
            *(self.core.library, [major * 10 + minor], case.dtype),
            *([case.head_dim] * 2, block_mask, 1),
        )
        attention = launcher.Attention(self.core, block_mask, *plans, case.heads)
        q, k, v, do = self.inputs
        out = attention.forward(q, k, v)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

        def fwd():
            attention.forward(q, k, v, out=out)

        def bwd(*gradients):
            attention.backward(q, k, v, *out, do, out=gradients)

        def both():
            fwd()
            bwd(dq, dk, dv)

        both()
        results = [x.transpose(1, 2) for x in (out[0], dq, dk, dv)]
        check = {}
        if case.q_len <= LONGEST_CHECKED:
            exact = self.exact(case)
            last = [x[-1, -1].float() for x in results]
            check["difference"] = difference(last, exact)
        delta = do_bench(lambda: bwd(None, None, None), return_mode="median")
        parts = {
            "delta_ms": delta,
            "dq_ms": time(lambda: bwd(dq, None, None))["ms"] - delta,
            "dkv_ms": time(lambda: bwd(None, dk, dv))["ms"] - delta,
        }
        emit(case, "fwd", gpu.reports.OURS, **time(fwd), **check)
        emit(case, "fwd+bwd", gpu.reports.OURS, **time(both), **check, **parts)
        return results

    def exact(self, case):
        """o, dq, dk, dv of the last head, dense float32."""
        torch.backends.cuda.matmul.allow_tf32 = False
        q, k, v, do = (x[-1, :, -1].float() for x in self.inputs)
        i = torch.arange(case.q_len, device="cuda")
        scores = q @ k.T * case.head_dim**-0.5
        scores.masked_fill_(~rule(case)[case.mode](i[:, None], i), -torch.inf)
        p = torch.softmax(scores, 1)
        o = p @ v
        ds = p * (do @ v.T - (do * o).sum(1, keepdim=True)) * case.head_dim**-0.5
        return o, ds @ k, ds.T @ q, p.T @ do

    def peer(self, case, name, attention, expected):
        """`expected`: our results, or None where the peer's positions lie otherwise."""

        def fwd():
            return attention(*self.leaves)

        def both():
            o = fwd()
            o.backward(self.d_output)
            results = [o, *(x.grad for x in self.leaves)]
            for leaf in self.leaves:
                leaf.grad = None
            return results

        check, results = {}, both()
        if expected:
            check["difference"] = difference(results, expected)
        del results
        emit(case, "fwd", name, **time(fwd), **check)
        emit(case, "fwd+bwd", name, **time(both), **check)


def emit(case, phase, contender, **row):
    gpu.emit(dict(case._asdict(), phase=phase, contender=contender, **row))


def difference(results, expected):
    """The largest, relative to the largest element expected; small enough, or it ends."""
    largest = max(
        ((x - y).abs().max() / y.abs().max()).item() for x, y in zip(results, expected)
    )
    if not largest <= TOLERANCE["bfloat16"]:
        raise AssertionError(f"results differ by {largest:.1e}")
    return largest


@functools.lru_cache(maxsize=None)
def compiled_flex():
    torch._dynamo.config.recompile_limit = 64  # one for each shape and pattern
    return torch.compile(flex_attention, dynamic=False)


def ceilings():
    """What this GPU's matmul and copy reach."""
    a, b = (
        torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "matmul_tflops": 2 * 8192**3 / time(lambda: a @ b)["ms"] / 1e9,
        "copy_tb_per_s": 4 * x.numel() / time(lambda: y.copy_(x))["ms"] / 1e9,
    }


def main():
    args = gpu.parse_args()
    versions = torch.__version__, torch.backends.cudnn.version()
    gpu.emit(
        {
            "framework": "PyTorch {} with cuDNN {}".format(*versions),
            "gpu": torch.cuda.get_device_name(),
            **ceilings(),
        }
    )
    core = launcher.load_core()
    for group in gpu.cases("kernels", args.modes, args.lengths):
        bench = Bench(core, group[0])
        for case in group:
            bench.measure(case)


if __name__ == "__main__":
    main()
