"""What each rule between q kT and the softmax adds to the kernels' time on a GPU.

    python benchmarks/gpu_rules.py --out gpu_rules.json

`all`, bfloat16, batch 4, T 16,384, 16 heads of 64, forward and backward, through the C ABI
on PyTorch tensors. Beside it, where it has the rule, FlexAttention, and PyTorch's own
attention with dropout (FlashAttention-2). Milliseconds are medians of CUDA-event times
(triton.testing.do_bench), 0.2 s each. Ours is checked against PyTorch in float32 on one
head of one sequence; what FlexAttention makes its masks in is included in its time where
the mask is made of data.
"""

import argparse
import functools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

import launcher  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.flex_attention import (  # noqa: E402
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from sparse_attention.native import abi  # noqa: E402
from sparse_attention.plan.patterns import pattern_block_mask  # noqa: E402

CAP, RATE, REACH = 30.0, 0.1, 512


def time(f):
    return round(do_bench(f, warmup=50, rep=200, return_mode="median"), 3)


def documents(batch, length, count):
    """int32 [batch, length]: `count` documents of the same length."""
    ids = np.arange(length, dtype=np.int32) * count // length
    return np.broadcast_to(ids, [batch, length]).copy()


def uneven_documents(batch, length, count):
    ids = np.random.RandomState(0).randint(0, count, [batch, length])
    return np.sort(ids, axis=1).astype(np.int32)


def rules(batch, length, heads):
    """{name: (arguments of `core_abi.rule_of`, what FlexAttention takes)}.

    What FlexAttention takes: a score_mod, a mask_mod of data, or neither.
    """
    random = np.random.RandomState(0)
    slopes = (0.5 ** np.arange(1.0, heads + 1)).astype(np.float32)
    bias = (0.25 * random.randn(heads, 2 * REACH - 1)).astype(np.float32)
    padding = random.rand(batch, 1, 1, length) < 0.9
    padding[:, :, :, : length // 8] = False
    padding[:, :, :, 0] = True
    mask = np.ones([1, 1, length, length], bool)
    holes = random.rand(1, 1, length, length) < 0.9
    holes[:, :, :, 0] = True
    on_device = functools.partial(torch.tensor, device="cuda")
    gpu_slopes, gpu_bias = on_device(slopes), on_device(bias).requires_grad_()
    gpu_padding, gpu_mask = on_device(padding[:, 0, 0]), on_device(mask[0, 0])
    gpu_holes = on_device(holes[0, 0])

    def causal_and(allowed):
        return lambda b, h, i, j: (i >= j) & allowed(b, h, i, j)

    def same(ids):
        ids = on_device(ids)
        return causal_and(lambda b, h, i, j: ids[b, i] == ids[b, j])

    found = {
        "none": ({}, {}),
        "logit_softcap": (
            {"logit_softcap": CAP},
            {"score_mod": lambda s, b, h, i, j: CAP * torch.tanh(s / CAP)},
        ),
        "alibi_slopes": (
            {"alibi_slopes": slopes},
            {"score_mod": lambda s, b, h, i, j: s - gpu_slopes[h] * (i - j).abs()},
        ),
        "relative_bias, its gradient too": (
            {"relative_bias": bias},
            {
                "score_mod": lambda s, b, h, i, j: (
                    s + gpu_bias[h, (i - j).clamp(1 - REACH, REACH - 1) + REACH - 1]
                )
            },
        ),
        "dropout": ({"dropout_rate": RATE, "dropout_seed": [1, 2]}, None),
        "mask of keys": (
            {"mask": padding},
            {"mask_mod": causal_and(lambda b, h, i, j: gpu_padding[b, j])},
        ),
        "mask of queries and keys": (
            {"mask": mask},
            {"mask_mod": causal_and(lambda b, h, i, j: gpu_mask[i, j])},
        ),
        "mask of queries and keys with holes": (
            {"mask": holes},
            {"mask_mod": causal_and(lambda b, h, i, j: gpu_holes[i, j])},
        ),
    }
    for count in (1, 16):
        ids = documents(batch, length, count)
        found[f"documents: {count}"] = (
            {"segment_ids": (ids, ids)},
            {"mask_mod": same(ids)},
        )
    ids = uneven_documents(batch, length, 16)
    found["documents: 16 uneven"] = {"segment_ids": (ids, ids)}, {"mask_mod": same(ids)}
    return found


class Bench:
    def __init__(self, batch, length, heads, head_dim):
        self.shape = batch, length, heads, head_dim
        torch.manual_seed(0)
        self.inputs = [
            torch.randn(self.shape, device="cuda", dtype=torch.bfloat16)
            for _ in range(4)
        ]
        by_head = [x.transpose(1, 2) for x in self.inputs]
        self.leaves = [x.detach().requires_grad_() for x in by_head[:3]]
        self.d_output = by_head[3]
        self.core = launcher.load_core()
        self.block_mask = pattern_block_mask("all", length, heads, 64)
        major, minor = torch.cuda.get_device_capability()
        self.plans = abi.plans(
            *(self.core.library, [major * 10 + minor], "bfloat16"),
            *([head_dim] * 2, self.block_mask, 1),
        )
        self.flex = torch.compile(flex_attention, dynamic=False)
        torch._dynamo.config.recompile_limit = 64

    def ours(self, rule):
        attention = launcher.Attention(
            self.core, self.block_mask, *self.plans, self.shape[2], rule=rule
        )
        q, k, v, do = self.inputs
        out = attention.forward(q, k, v)
        gradients = attention.backward(q, k, v, *out, do)

        def fwd():
            attention.forward(q, k, v, out=out)

        def both():
            fwd()
            attention.backward(q, k, v, *out, do, out=gradients)

        row = {"fwd_ms": time(fwd), "fwd_bwd_ms": time(both)}
        return row, [x.transpose(1, 2) for x in (out[0], *gradients[:3])]

    def peer(self, attention):
        def both():
            o = attention(*self.leaves)
            o.backward(self.d_output)
            results = [o, *(x.grad for x in self.leaves)]
            for leaf in self.leaves:
                leaf.grad = None
            return results

        results = [x.detach() for x in both()]
        row = {
            "fwd_ms": time(lambda: attention(*self.leaves)),
            "fwd_bwd_ms": time(both),
        }
        return row, results

    def flex_with(self, score_mod=None, mask_mod=None):
        batch, length = self.shape[:2]

        def blocks(mask_mod, batch):
            return create_block_mask(mask_mod, batch, None, length, length, "cuda")

        causal = blocks(lambda b, h, i, j: i >= j, None)

        def attention(q, k, v):
            made = causal if mask_mod is None else blocks(mask_mod, batch)
            return self.flex(q, k, v, score_mod=score_mod, block_mask=made)

        return attention


def difference(results, expected):
    """The largest, relative to the largest element expected."""
    return max(
        ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()
        for x, y in zip(results, expected)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4x16384x16x64")
    parser.add_argument("--only", nargs="*", help="names of rules")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    shape = tuple(map(int, args.shape.split("x")))
    bench = Bench(*shape)
    head = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    rows = []
    for name, (rule, flex) in rules(*shape[:3]).items():
        if args.only and name not in args.only:
            continue
        row, results = bench.ours(rule)
        rows.append({"rule": name, "contender": "sparse_attention", **row})
        if rows[0]["rule"] == "none":
            rows[-1]["times_none"] = round(row["fwd_bwd_ms"] / rows[0]["fwd_bwd_ms"], 3)
        print(rows[-1], flush=True)
        peers = {}
        if not args.no_peers:
            if flex is not None:
                peers["FlexAttention"] = bench.flex_with(**flex)
            else:
                peers["PyTorch FlashAttention-2"] = functools.partial(
                    scaled_dot_product_attention, is_causal=True, dropout_p=RATE
                )
        for contender, attention in peers.items():
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    row, expected = bench.peer(attention)
                if flex is not None:
                    row["difference"] = round(difference(results, expected), 5)
            except Exception as error:  # a peer that fails is reported as such
                row = {"error": str(error)[:200]}
            rows.append({"rule": name, "contender": contender, **row})
            print(rows[-1], flush=True)
        del results
        if args.out:
            text = json.dumps({"head": head, "shape": shape, "rows": rows}, indent=1)
            args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
