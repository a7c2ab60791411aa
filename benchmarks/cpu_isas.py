"""The CPU kernels with each instruction set of this machine, through the C ABI.

    python benchmarks/cpu_isas.py --threads 2

needs no TensorFlow. Times causal SDPA in the same process where PyTorch is installed. T 4096,
batch 1, 4 heads of 64, local_attn_ctx 128, blocks of 32; median ms of a call.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

from core_abi import Core  # noqa: E402
from helpers import to_dtype  # noqa: E402

from sparse_attention.native import libraries  # noqa: E402
from sparse_attention.plan.patterns import PATTERNS, pattern_block_mask  # noqa: E402

T, HEADS, DIM = 4096, 4, 64
DTYPES = ("float32", "bfloat16")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def median_ms(call, seconds=0.5):
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times)


class TimedCore(Core):
    """Repeats each call of the library and keeps its median in `ms`."""

    def __init__(self, isa, folder):
        copy = os.path.join(folder, isa + ".so")  # which reads the variable once
        shutil.copy(libraries.build_core(), copy)
        os.environ["SPARSE_ATTENTION_ISA"] = isa
        super().__init__(copy)
        self.is_there = self.isa() == isa

    def _run(self, call):
        self.ms = median_ms(call)


def ours(core, threads):
    random = np.random.RandomState(0)
    arrays = [random.normal(size=[1, T, HEADS, DIM]) for _ in range(4)]
    for dtype in DTYPES:
        q, k, v, do = [to_dtype(x, dtype) for x in arrays]
        for mode in PATTERNS:
            block_mask = pattern_block_mask(mode, T, HEADS, 32, 128, num_verts=1)
            o, lse = core.fwd(q, k, v, block_mask, workers=threads)
            forward = core.ms
            core.bwd(q, k, v, o, lse, do, block_mask, workers=threads)
            print(
                f"{core.isa():12} {dtype:8} {mode:8} {forward:8.2f} / {core.ms:.2f}",
                flush=True,
            )


def sdpa(threads):
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)
    attention = torch.nn.functional.scaled_dot_product_attention
    for dtype in DTYPES:
        q, k, v, do = (
            torch.randn(1, HEADS, T, DIM, dtype=getattr(torch, dtype)) for _ in range(4)
        )
        forward = median_ms(lambda: attention(q, k, v, is_causal=True))  # noqa: B023
        for x in (q, k, v):
            x.requires_grad_()

        def train():
            torch.autograd.grad(attention(q, k, v, is_causal=True), (q, k, v), do)  # noqa: B023

        both = median_ms(train)
        print(
            f"PyTorch {torch.__version__} SDPA {dtype:8} all {forward:8.2f} / "
            f"{both - forward:.2f}, forward and backward {both:.2f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isas", nargs="+", default=ISAS, choices=ISAS)
    options = parser.parse_args()
    threads = options.threads
    print(f"{threads} threads; ms forward / backward")
    with tempfile.TemporaryDirectory() as folder:
        for isa in options.isas:
            core = TimedCore(isa, folder)
            if core.is_there:
                ours(core, threads)
    sdpa(threads)


if __name__ == "__main__":
    main()
