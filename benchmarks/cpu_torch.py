"""What PyTorch offers: scaled_dot_product_attention and FlexAttention.

Serves `cpu.py`, from an environment of its own. Inputs are split into heads, and laid
out as these functions like them best, before the clock starts.
"""

import sys

import torch
from cpu_worker import serve
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

torch._dynamo.config.recompile_limit = 1000  # one for each case
flex_attention = torch.compile(flex_attention, dynamic=False)


def sdpa(case):
    if case["mode"] in ("all", "strided"):
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = torch.arange(case["q_len"])
    mask = _mask_mod(case)(None, None, rows[:, None], rows)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(case):
    return _flex(case, _mask_mod(case), _strided_shape(case)[1])


def flex_chunks(case):
    """`strided` as the Sparse Transformer has it: chunks of one transposed sequence."""
    chunk = case["q_len"] // case["local_attn_ctx"]
    return _flex(
        case,
        lambda b, h, i, j: (i >= j) & (i // chunk == j // chunk),
        case["q_len"],
    )


def _flex(case, mask_mod, q_len):
    block_mask = create_block_mask(
        mask_mod, None, None, q_len, q_len, "cpu", BLOCK_SIZE=case["block_size"]
    )
    return lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask)


def _mask_mod(case):
    window, block_size = case["local_attn_ctx"], case["block_size"]
    return {
        "all": lambda b, h, i, j: i >= j,
        "strided": lambda b, h, i, j: i >= j,  # of positions of equal residue
        "local": lambda b, h, i, j: (i >= j) & (i - j < window),
        "fixed": lambda b, h, i, j: (
            (i >= j)
            & ((i // window == j // window) | (j % window >= window - block_size))
        ),
    }[case["mode"]]


# ---- layouts ----


def _strided_shape(case):
    """(residues, visits): row = visit * residues + residue. Not strided: 1 residue."""
    stride = case["local_attn_ctx"] if case["mode"] == "strided" else 1
    return stride, case["q_len"] // stride


def by_head(x, case):
    """To [batch, residues * heads, visits, head_dim]."""
    residues, visits = _strided_shape(case)
    return x.view(len(x), visits, residues * case["heads"], -1).transpose(1, 2)


def from_heads(o, case):
    return o.transpose(1, 2).reshape(len(o), case["q_len"], -1)


def by_chunk(x, case):
    """To [batch, heads, residues * visits, head_dim]."""
    residues, visits = _strided_shape(case)
    x = x.view(len(x), visits, residues, case["heads"], -1).permute(0, 3, 2, 1, 4)
    return x.flatten(2, 3)


def from_chunks(o, case):
    o = o.unflatten(2, _strided_shape(case)).permute(0, 3, 2, 1, 4)
    return o.reshape(len(o), case["q_len"], -1)


# ---- serving ----


def contender(attention, split=by_head, merge=from_heads):
    """A `build` for `serve`."""

    def build(case, inputs, is_training):
        dtype = getattr(torch, case["dtype"])
        *qkv, do = (
            split(torch.from_numpy(x).to(dtype), case).contiguous() for x in inputs
        )
        for x in qkv:
            x.requires_grad_(is_training)
        attend = attention(case)

        def run():
            with torch.set_grad_enabled(is_training):
                o = attend(*qkv)
            return [o, *(torch.autograd.grad(o, qkv, do) if is_training else [])]

        def to_numpy(x):
            return merge(x.detach(), case).float().numpy()

        return run, to_numpy

    return build


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    serve(
        {
            "sdpa": contender(sdpa),
            "flex": contender(flex),
            "flex_chunks": contender(flex_chunks, by_chunk, from_chunks),
        },
        "PyTorch " + torch.__version__,
    )
