"""Which results have the same bits on a CPU: the table in docs/numerics.md, cell by cell.

A process computes everything once; so do others with other settings, and all compare.
"""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import DTYPES, PATTERNS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OPS = ("o and lse", "dq", "dk and dv", "three ops")
BATCH = 3


@functools.lru_cache(maxsize=None)
def digests(threads, run=0, isa=""):
    """What `report` gives in a new process with so many threads for an op."""
    environment = dict(os.environ, PYTHONPATH=ROOT, SPARSE_ATTENTION_ISA=isa)
    if not isa:
        del environment["SPARSE_ATTENTION_ISA"]
    out = subprocess.check_output(
        [sys.executable, __file__, str(threads)], env=environment, timeout=600
    )
    return json.loads(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_two_processes_give_the_same_bits(op, dtype):
    assert digests(2)[op][dtype] == digests(2, run=1)[op][dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op, dtype):
    assert digests(1)[op][dtype] == digests(2)[op][dtype] == digests(5)[op][dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["o and lse", "dq", "three ops"])
def test_a_sequence_has_the_same_bits_in_any_batch(op, dtype):
    together, alone = digests(2)[op][dtype]
    assert together == alone and len(set(alone)) == BATCH


def test_dk_and_dv_of_a_sequence_depend_on_the_batch():
    """A batch with few heads in all is cut along the queries, whose shares are then added."""
    together, alone = digests(2)["dk and dv"]["float32"]
    assert together != alone


def test_instruction_sets_differ():
    """They add in other orders: only the tolerance to the reference holds for all."""
    from sparse_attention.native.libraries import ISAS

    if "avx2" in ISAS:  # baseline has no fused multiply-add
        baseline = digests(2, isa="baseline")["o and lse"]["float32"]
        assert baseline != digests(2)["o and lse"]["float32"]


def test_every_cell_of_the_table_names_a_test_that_exists():
    with open(os.path.join(ROOT, "docs", "numerics.md"), encoding="utf-8") as file:
        section = re.search(r"^## Determinism\n(.*?)^## ", file.read(), re.M | re.S)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", section.group(1))
    assert len(named) > 5
    for path, name in named:
        with open(os.path.join(ROOT, "tests", path), encoding="utf-8") as file:
            assert f"\ndef {name}(" in file.read(), (path, name)


# ---- in the processes ----


def report(threads):
    """{op: {dtype: (digests of a batch's sequences, of each sequence alone)}}"""
    import numpy as np
    import tensorflow as tf
    from helpers import to_dtype

    import sparse_attention as sa

    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads)
    plans = [sa.pattern_block_mask(mode, 300, 4, 16, 48, 2) for mode in PATTERNS]
    layout = np.tril(np.ones([10, 10], bool))
    bst = sa.BlocksparseTransformer(layout, 32, 4)

    def attention(q, k, v):
        calls = [
            sa.block_sparse_attention(q, k, v, plan, 4, return_lse=True)
            for plan in plans
        ]
        return sum(map(list, calls), [])

    def o_and_lse(q, k, v, do):
        return attention(q, k, v)

    def dq(q, k, v, do):
        return tf.gradients(attention(q, k, v)[::2], q, len(plans) * [do])

    def dk_and_dv(q, k, v, do):
        return tf.gradients(attention(q, k, v)[::2], [k, v], len(plans) * [do])

    def three_ops(q, k, v, do):
        q, k, v, do = (tf.pad(x, [[0, 0], [0, 20], [0, 0]]) for x in (q, k, v, do))
        scores = bst.nt_op(q, k, dtype=tf.float32)
        weights = bst.softmax(scores, 0.25, dtype=tf.bfloat16)
        o = bst.nn_op(weights, v)
        return [scores, weights, o, *tf.gradients(o, [q, k, v], do)]

    def results(function, inputs):
        """[what each sequence of the batch gives, as bytes]"""
        with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
            tensors = session.run(function(*map(tf.constant, inputs)))
        return [
            b"".join(x[i].tobytes() for x in tensors) for i in range(len(inputs[0]))
        ]

    found = {}
    random = np.random.RandomState(0).normal(size=[4, BATCH, 300, 4 * 24])
    for op, function in zip(OPS, (o_and_lse, dq, dk_and_dv, three_ops)):
        found[op] = {}
        for dtype in DTYPES:
            inputs = [to_dtype(x, dtype) for x in random]
            alone = []
            for i in range(BATCH):
                alone += results(function, [x[i : i + 1] for x in inputs])
            together = results(function, inputs)
            found[op][dtype] = [
                [hashlib.sha256(x).hexdigest() for x in xs] for xs in (together, alone)
            ]
    return found


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1]))))
