"""Graphs that somebody crafted: an error or a right result, never a crash, never for ever.

A SavedModel is input from outside. Each case here once ended the process, ran without
end, read or wrote outside of an array, or left an output unwritten.
"""

import numpy as np
import pytest
import tensorflow as tf
from test_blocksparse_ops import call, example, load_blocksparse_ops
from tf_helpers import run_script

from sparse_attention.native import loader

FEW = np.zeros(0, np.uint8)
BY_KV = ("tile_blocks", "q_indptr", "q_indices", "kv_mask_ids", "kv_mask_bits")
REFUSED = (ValueError, tf.errors.InvalidArgumentError, tf.errors.ResourceExhaustedError)


def as_bytes(integers):
    return np.array(integers, np.int32).view(np.uint8).reshape(-1, 4)


def plan_of_nothing(q_tiles=0):
    """A plan whose `q_tiles` lists are empty."""
    return {
        "kv_indptr": as_bytes([0] * (q_tiles + 1)),
        "kv_indices": as_bytes([]),
        "mask_ids": as_bytes([]),
        "mask_bits": np.zeros([0, 8, 1], np.uint8),
    }


def zeros(shape, dtype=tf.float32):
    """`tf.zeros` without its cast of the sizes to int32."""
    return tf.fill(tf.cast(shape, tf.int64), tf.zeros([], dtype))


class Zeros:
    """An input of zeros of any shape, which NumPy may not be able to hold."""

    def __init__(self, *shape, dtype=tf.float32):
        self.shape, self.dtype = shape, dtype

    def __call__(self):
        return zeros(self.shape, self.dtype)


def attend(
    q, k, v, plan, lengths=(), gradient=False, fetch=True, rule_inputs=(), **attributes
):
    """What the op gives, or its gradient, for inputs of any shape; no `fetch`: it runs."""
    attributes = dict(
        {"heads": 1, "kv_heads": 1, "softmax_scale": 1.0, "row_stride": 1},
        **dict({"block_q": 8, "block_kv": 8, "tile_kv": 0}, **attributes),
    )
    ops = loader.attention_ops()
    if not isinstance(lengths, Zeros):
        lengths = np.array(lengths, np.int32)
    inputs = dict(plan, q=q, k=k, v=v, kv_lengths=lengths, **dict.fromkeys(BY_KV, FEW))
    op = ops.block_sparse_attention
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        # Only the kernel sees the shapes.
        inputs = {
            name: tf.compat.v1.placeholder_with_default(x() if callable(x) else x, None)
            for name, x in inputs.items()
        }
        if gradient:
            op = ops.block_sparse_attention_grad
            batch, q_len, _ = tf.unstack(tf.shape(inputs["q"], out_type=tf.int64), 3)
            heads = attributes["heads"]
            inputs["o"] = inputs["do"] = zeros([batch, q_len, heads * 8])
            inputs["lse"] = inputs["dlse"] = zeros([batch, heads, q_len])
        results = op(**inputs, rule_inputs=list(rule_inputs), **attributes)
        return session.run(results if fetch else results[0].op)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mask_bits": Zeros(2**62, 0, 1, dtype=tf.uint8)},
            r"mask_bits must have shape \[4611686018427387904,8,1\]",
        ),
        ({"q": Zeros(2**40, 0, 16), "k": Zeros(0, 2**40, 16)}, "k must have shape"),
        ({"q": Zeros(2**58, 0, 8)}, "sizes of q must multiply to at most 2.60"),
        ({x: Zeros(0, 2**31, 8) for x in "qkv"}, "q_len must be in"),
        ({"row_stride": 2**63 - 1}, r"row_stride must be in \[1, 2\^31\)"),
        ({"row_stride": 2**24}, r"row_stride must be in \[1, 1\], the longer of"),
        ({"v": Zeros(1, 0, 2**32 + 8)}, r"head_dim_v must be .* got 4294967304"),
        ({"q": Zeros(1, 0, 2**32 + 8)}, r"head_dim must be .* got 4294967304"),
        ({"lengths": Zeros(0, 2**40, dtype=tf.int32)}, "kv_lengths must have shape"),
        (
            {"kv_indices": Zeros(2**40, 0, dtype=tf.uint8)},
            r"kv_indices must have shape \[1099511627776,4\]",
        ),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_sizes_that_no_tensor_can_have_are_refused(gradient, changes, message):
    arguments = dict(zip("qkv", [Zeros(1, 1, 8)] * 3))
    plan = plan_of_nothing(1)
    plan.update((n, changes[n]) for n in set(plan) & set(changes))
    changes = {n: x for n, x in changes.items() if n not in plan}
    with pytest.raises(REFUSED, match=message):
        attend(**dict(arguments, **changes), plan=plan, gradient=gradient)


LARGE = Zeros(2**40, 2**23 - 1, 0, 8, 8)


@pytest.mark.parametrize(
    "op, changes, message",
    [
        ("blocksparse_transformer_nt", {"ctx_blks_a": 2**60}, "ctx_blks_a must be in"),
        ("blocksparse_transformer_nt", {"ctx_blks_b": 2**60}, "ctx_blks_b must be in"),
        ("blocksparse_transformer_nt", {"heads": 2**40}, "heads must be in"),
        ("blocksparse_transformer_nt", {"blocks": 2**62}, "blocks must be in"),
        ("blocksparse_transformer_nt", {"blk_size": 2**62}, "blk_size must be 8"),
        ("blocksparse_transformer_nn", {"ctx_blks_c": 2**60}, "ctx_blks_c must be in"),
        ("blocksparse_transformer_tn", {"ctx_blks_c": 2**60}, "ctx_blks_c must be in"),
        ("blocksparse_transformer_tn", {"blk_size": 2**62}, "blk_size must be 8"),
        ("blocksparse_transformer_tn", {"tn_max": 2**62}, "tn_max must be in"),
        (
            "blocksparse_softmax",
            {"x": LARGE, "blk_size": 8, "blocks": 2**30},
            "x must have shape",
        ),
        (
            "blocksparse_softmax",
            {"x": LARGE, "blk_size": 8, "blocks": 0},
            "must multiply to at most",
        ),
        ("blocksparse_softmax", {"ctx_blks": 2**60}, "ctx_blks must be in"),
        (
            "blocksparse_softmax_grad",
            {"dy": LARGE, "y": LARGE, "blk_size": 8, "blocks": 0},
            "multipl",
        ),
        (
            "blocksparse_masked_softmax",
            {"x": LARGE, "blk_size": 8, "blocks": 0},
            "must multiply to",
        ),
        ("bst_partial_autoregressive_mask", {"blocks": 2**40}, "blocks must be in"),
        (
            "bst_partial_autoregressive_mask",
            {
                "mask": Zeros(2**32 + 2, 8, 0, dtype=tf.uint8),
                "blk_size": 8,
                "blocks": 0,
            },
            r"mask must have heads in \[1, 2\^31\), got 4294967298",
        ),
    ],
)
def test_sizes_of_the_three_ops_are_refused_before_they_are_used(op, changes, message):
    with pytest.raises(REFUSED, match=message):
        call(op, **changes)


@pytest.mark.parametrize(
    "op, arguments",
    [
        ("attention", {"q": Zeros(3, 2**60, 0), "v": Zeros(3, 1, 8)}),
        ("blocksparse_transformer_nt", {"heads": 2**30, "blocks": 2**30}),
        (
            "blocksparse_transformer_nn",
            {"ctx_blks_c": 2**30, "b": Zeros(2**30, 0, 2**8)},
        ),
    ],
)
def test_a_graphs_shapes_are_those_of_tensors(op, arguments):
    """Grappler multiplies the sizes of what a Reshape reads, and ends the process."""
    with tf.Graph().as_default():
        arguments = {name: x() if callable(x) else x for name, x in arguments.items()}
        with pytest.raises(ValueError, match="must multiply to at most"):
            if op == "attention":
                attributes = {"heads": 4, "kv_heads": 1, "softmax_scale": 1.0}
                attributes.update(row_stride=1, block_q=8, block_kv=8, tile_kv=0)
                plan = dict(plan_of_nothing(), **dict.fromkeys(BY_KV, FEW))
                loader.attention_ops().block_sparse_attention(
                    **dict(arguments, k=arguments["v"], kv_lengths=[]),
                    **dict(plan, rule_inputs=[], **attributes),
                )
            else:
                arguments = dict(example(op), **arguments)
                getattr(load_blocksparse_ops(), op)(**arguments)


def gradients_of_a_bias(batch, heads):
    """Without queries, but with a key; the sums would take batch * heads * 2^23 bytes."""
    q, k = Zeros(batch, 0, 8 * heads), Zeros(batch, 1, 8)
    sizes = {"heads": heads, "kv_heads": 1, "gradient": True}
    bias = np.ones([1, 2**20 - 1], np.float32)
    rule = {"rule": ["relative_bias"], "rule_inputs": [bias]}
    return attend(q, k, k, plan_of_nothing(), **sizes, **rule)


def test_sums_of_a_bias_that_no_query_has_take_no_memory():
    _, dk, _, dbias = gradients_of_a_bias(2**16, 2**10)
    assert dk.shape == (2**16, 1, 8) and not dk.any()
    assert dbias.shape == (1, 2**20 - 1) and not dbias.any()


def test_sums_of_a_bias_that_64_bits_cannot_count_are_refused():
    """2^66 bytes."""
    with pytest.raises(tf.errors.InvalidArgumentError, match="relative_bias must have"):
        gradients_of_a_bias(2**20, 2**23)


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (5, 0), (0, 0)])
def test_every_gradient_is_written(q_len, kv_len):
    """Memory that was freed is not zero; what an op leaves unwritten shows it."""
    junk = [np.full([2, 8192, 8], np.nan, np.float32) for _ in range(8)]
    del junk
    q, k = Zeros(2, q_len, 8), Zeros(2, kv_len, 8)
    plan = plan_of_nothing((q_len + 7) // 8)
    for _ in range(8):
        got = attend(q, k, k, plan, gradient=True)
        for gradient, x in zip(got, (q, k, k)):
            np.testing.assert_array_equal(gradient, np.zeros(x.shape, np.float32))


NOTHING = """
import sys
import numpy as np
import tensorflow as tf
sys.path.insert(0, "tests")
import test_crafted_graphs as crafted

batch = 2**40
zeros, plan = crafted.Zeros(batch, 0, 8), crafted.plan_of_nothing()
for gradient in (False, True):
    crafted.attend(zeros, zeros, zeros, plan, gradient=gradient, fetch=False)
x = crafted.Zeros(batch, 1, 0, 8, 8)
lut = np.zeros([1, 3, 2], np.int32)
lut[..., 0] = 3
blocks = {"blk_size": 8, "blocks": 0, "fetch": False}
crafted.call("blocksparse_softmax", x=x, lut=lut, **blocks)
mask = crafted.Zeros(2**31 - 1, 8, 0, dtype=tf.uint8)
places = crafted.Zeros(2**31 - 1, 0, 2, dtype=tf.int32)
crafted.call("bst_partial_autoregressive_mask", mask=mask, lut=places, **blocks)
print("done")
"""


def test_no_element_is_no_work():
    """However many sequences or heads have none; else it would run for ever."""
    assert run_script(NOTHING) == "done\n"
