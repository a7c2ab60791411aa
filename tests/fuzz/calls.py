"""Calls of the package's ops: valid ones, and what mutations make of them.

A call is made of its seed alone. Nothing here runs TensorFlow, so that a process may fork
after it.
"""

import functools
import random
from collections import namedtuple

import numpy as np
import tensorflow as tf

from sparse_attention.compat.tables import BlocksparseTables
from sparse_attention.ops.signature import RULE_INPUTS, SHARED_INPUTS

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "float64", "bool", "int32", "int64")
DTYPES += ("uint8", "uint16", "uint32", "uint64")
MODES = ("eager", "eager", "constants", "fed", "mixed", "imported")

# A tensor of any shape, also of one that NumPy cannot hold. `data` is flat, and repeated
# until it fills the shape.
Array = namedtuple("Array", "dtype shape data")


class Call:
    """An op with its inputs and attributes.

    Attributes:
      op: The op's name.
      outputs: How many it has.
      inputs: {name: `Array`}, in the op's order.
      attributes: {name: int, float, `tf.DType`, or a list of str or of `tf.DType`}.
      plan: Names of the inputs that say where the op reads and writes.
      mode: One of `MODES`. "eager"; or else in an imported graph that knows all inputs, or
        none, or some; or in one that is imported and does not run.
      fed: Names of the inputs that such a graph does not know.
      notes: What mutations did.
    """

    def __init__(self, op, inputs, attributes, plan, outputs=1):
        self.op, self.outputs, self.plan = op, outputs, plan
        self.inputs = {name: array_of(x) for name, x in inputs.items()}
        self.attributes, self.mode, self.fed, self.notes = attributes, "eager", (), []

    def __str__(self):
        lines = [f"{self.op}, {self.mode}"]
        lines += [
            f"  {name}: {x.dtype} {list(x.shape)}" for name, x in self.inputs.items()
        ]
        lines += [f"  {name} = {value!r}" for name, value in self.attributes.items()]
        return "\n".join(lines + [f"  mutation: {note}" for note in self.notes])


def array_of(x):
    return Array(x.dtype.name, x.shape, x.reshape(-1))


def elements(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def np_dtype(name):
    return tf.as_dtype(name).as_numpy_dtype


def as_bytes(integers):
    """uint8 [..., 4], as the fused ops read integers."""
    integers = np.ascontiguousarray(integers, np.int32)
    return integers.view(np.uint8).reshape(*integers.shape, 4)


# ---- valid calls ----


class Draw:
    """Random choices, with all that is random about a call."""

    def __init__(self, seed):
        self.random, self.numpy = random.Random(seed), np.random.RandomState(seed)
        self.one_of, self.chance = self.random.choice, self.random.random

    def floats(self, dtype, *shape):
        return self.numpy.standard_normal(shape).astype(np_dtype(dtype))

    def layout(self, *shape):
        """bool: all, no, or some True."""
        return self.numpy.random_sample(shape) < self.one_of([0, 0.2, 0.6, 1])


def attention(draw, lengths=(0, 1, 5, 19, 40)):
    """A call of BlockSparseAttention or its gradient, with a plan that no pattern has."""
    dtype, batch = draw.one_of(FLOATS), draw.one_of([0, 1, 2, 3])
    q_len, kv_len = draw.one_of(lengths), draw.one_of(lengths)
    kv_heads = draw.one_of([1, 2])
    heads = kv_heads * draw.one_of([1, 2])
    head_dim, head_dim_v = draw.one_of([8, 16, 40]), draw.one_of([8, 24, 40])
    row_stride = draw.one_of([1, 1, min(3, max(q_len, kv_len, 1))])
    sizes = [8, 16, 32, 64, 128]
    block_q, block_kv = draw.one_of(sizes), draw.one_of(sizes)

    def blocks(length, block):
        return -(-(-(-length // row_stride) * row_stride) // block)

    lists = blocks(q_len, block_q), blocks(kv_len, block_kv)
    is_read = draw.layout(draw.one_of([1, heads]), *lists)
    counts = is_read.sum(axis=2).reshape(-1)
    kv_indices, masks = np.nonzero(is_read)[2], draw.one_of([0, 1, 4])
    none = np.zeros(0, np.uint8)
    shared = {
        "kv_lengths": draw.numpy.randint(0, kv_len + 1, batch).astype(np.int32),
        "kv_indptr": as_bytes(np.concatenate([[0], np.cumsum(counts)])),
        "kv_indices": as_bytes(kv_indices),
        "mask_ids": as_bytes(draw.numpy.randint(-1, masks, len(kv_indices))),
        "mask_bits": draw.numpy.randint(0, 256, (masks, block_kv, block_q // 8)),
    }
    shared["mask_bits"] = shared["mask_bits"].astype(np.uint8)
    if draw.chance() < 0.3:
        shared["kv_lengths"] = shared["kv_lengths"][:0]
    shared = {name: shared.get(name, none) for name in SHARED_INPUTS}
    inputs = {
        "q": draw.floats(dtype, batch, q_len, heads * head_dim),
        "k": draw.floats(dtype, batch, kv_len, kv_heads * head_dim),
        "v": draw.floats(dtype, batch, kv_len, kv_heads * head_dim_v),
    }
    attributes = {"T": tf.as_dtype(dtype), "heads": heads, "kv_heads": kv_heads}
    attributes.update(softmax_scale=0.3, row_stride=row_stride)
    attributes.update(block_q=block_q, block_kv=block_kv, tile_kv=0)
    plan = ("kv_lengths", "kv_indptr", "kv_indices", "mask_ids")
    rule = score_rule(draw, batch, heads, q_len, kv_len)
    types = [tf.as_dtype(x.dtype) for x in rule.values()]
    attributes.update(rule=list(rule), rule_types=types)
    attributes.update(
        logit_softcap=draw.one_of([0.0, 2.0]), q_offset=draw.one_of([0, 7])
    )
    attributes["dropout_rate"] = 0.3 if "dropout_seed" in rule else 0.0
    shared.update(rule)
    if draw.chance() < 0.5:
        inputs.update(shared)
        return Call("BlockSparseAttention", inputs, attributes, plan, outputs=2)
    for name in ("o", "lse", "do", "dlse"):
        inputs[name] = (
            draw.floats("float32", batch, heads, q_len)
            if "lse" in name
            else draw.floats(dtype, batch, q_len, heads * head_dim_v)
        )
    inputs.update(shared)
    return Call("BlockSparseAttentionGrad", inputs, attributes, plan, outputs=4)


def score_rule(draw, batch, heads, q_len, kv_len):
    """{name: array} of none, some or all inputs of a rule."""
    sizes = [draw.one_of([1, size]) for size in (batch, heads, q_len, kv_len)]
    width = 2 * draw.one_of([1, 5, 50]) - 1
    seed = draw.numpy.randint(-(2**62), 2**62, 2)
    segments = [draw.numpy.randint(-1, 3, (batch, n)) for n in (q_len, kv_len)]
    rule = {
        "alibi_slopes": draw.floats("float32", heads),
        "relative_bias": draw.floats("float32", draw.one_of([1, heads]), width),
        "q_segments": segments[0].astype(np.int32),
        "kv_segments": segments[1].astype(np.int32),
        "mask": draw.layout(*sizes),
        "dropout_seed": seed.astype(np.int64),
    }
    share = draw.one_of([0, 0, 0.3, 1])
    kept = [name for name in RULE_INPUTS if draw.chance() < share]
    if ("q_segments" in kept) != ("kv_segments" in kept):
        kept = [name for name in kept if "segments" not in name]
    return {name: rule[name] for name in kept}


def blocksparse(draw, lengths=(1, 2, 3, 5)):
    """A call of one of blocksparse's ops."""
    kind = draw.one_of(["NT", "NN", "TN", "Masked", "Softmax", "SoftmaxGrad", "Mask"])
    dtype, other, batch = (
        draw.one_of(FLOATS),
        draw.one_of(FLOATS),
        draw.one_of([0, 1, 2]),
    )
    heads, block_size = draw.one_of([1, 2, 3]), draw.one_of([8, 16, 32, 64])
    q_blocks, kv_blocks = draw.one_of(lengths), draw.one_of(lengths)
    head_dim = draw.one_of([8, 24, 40])
    layout = draw.layout(draw.one_of([1, heads]), q_blocks, kv_blocks)
    tables = BlocksparseTables(layout, block_size, heads)
    blocks = tables.blocks
    attributes = {"blocks": blocks, "blk_size": block_size}
    scores = batch, heads, blocks, block_size, block_size
    words = np.dtype(f"uint{block_size}")
    mask = draw.numpy.bytes(len(layout) * block_size * blocks * words.itemsize)
    mask = np.frombuffer(mask, words).reshape(len(layout), block_size, blocks)
    if kind in ("NT", "NN", "TN"):
        attributes.update(heads=heads, nn_max=tables.nn_max, tn_max=tables.tn_max)
        attributes.update(bench=0, T=tf.as_dtype(dtype))
        q, kv = (
            draw.floats(dtype, batch, n * block_size, heads * head_dim)
            for n in (q_blocks, kv_blocks)
        )
        counts = {"NT": (q_blocks, kv_blocks, 0), "NN": (0, kv_blocks, q_blocks)}
        counts["TN"] = (0, q_blocks, kv_blocks)
        attributes.update(zip(("ctx_blks_a", "ctx_blks_b", "ctx_blks_c"), counts[kind]))
        attributes["CT" if kind == "NT" else "AT"] = tf.as_dtype(other)
        a = q if kind == "NT" else draw.floats(other, *scores)
        inputs = {"a": a, "b": q if kind == "TN" else kv, "nt_lut": tables.nt_lut}
        inputs.update(nn_lut=tables.nn_lut, tn_lut=tables.tn_lut)
        plan = (kind.lower() + "_lut",)
        return Call("BlocksparseTransformer" + kind, inputs, attributes, plan)
    if kind == "Mask":
        key = draw.one_of([np.int32, np.int64])(block_size * kv_blocks // 2)
        inputs = {"mask": mask, "lut": tables.nt_lut, "autoregress_at_k": np.array(key)}
        attributes.update(ctx_blks_k=kv_blocks, MT=tf.as_dtype(words))
        attributes["KT"] = tf.as_dtype(key.dtype)
        plan = ("lut", "autoregress_at_k")
        return Call("BstPartialAutoregressiveMask", inputs, attributes, plan)
    attributes.update(ctx_blks=q_blocks, lut_max=tables.nn_max, T=tf.as_dtype(dtype))
    rest = {"scale": np.array(0.3, np.float32), "lut": tables.nn_lut}
    if kind == "SoftmaxGrad":
        dy, y = draw.floats(dtype, *scores), draw.floats(dtype, *scores)
        inputs = dict({"dy": dy, "y": y}, **rest)
        return Call("BlocksparseSoftmaxGrad", inputs, attributes, ("lut",))
    attributes["XT"] = tf.as_dtype(draw.one_of(["bfloat16", "float32"]))
    inputs = dict({"x": draw.floats(attributes["XT"].name, *scores)}, **rest)
    if kind == "Softmax":
        return Call("BlocksparseSoftmax", inputs, attributes, ("lut",))
    inputs["mask"], attributes["MT"] = mask, tf.as_dtype(words)
    return Call("BlocksparseMaskedSoftmax", inputs, attributes, ("lut",))


# ---- mutations ----

SIZES = (0, 1, 2, 3, 7, 8, 2**28, 2**31 - 1, 2**31, 2**32, 2**32 + 8)
SIZES += (2**40, 2**60, 2**62, 2**63 - 1)
NEGATIVES = (-1, -8, -(2**31), -(2**63))
INTEGERS = (-1, -2, 0, 1, 2, 2**15, 2**28, 2**31 - 1, -(2**28), -(2**31))
INTEGERS += (2**32 + 8, 2**63 - 1, -(2**63))  # in 32 bits: 8, -1 and 0
REALS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, -1e30, 1e-40)
MOST_ELEMENTS = 2**18


def another_size(draw, size):
    near = size + 1, max(size - 1, 0), 2 * size, size + 2**31, size + 2**32
    size = draw.one_of([draw.one_of(SIZES), draw.one_of(near)])
    return min(size, 2**63 - 1)


def an_input(draw, call):
    return draw.one_of(list(call.inputs))


def replace(call, name, **changes):
    call.inputs[name] = call.inputs[name]._replace(**changes)


def resize(draw, call):
    """One dimension of one input."""
    name = an_input(draw, call)
    shape = list(call.inputs[name].shape)
    if shape:
        axis = draw.random.randrange(len(shape))
        shape[axis] = another_size(draw, shape[axis])
        replace(call, name, shape=tuple(shape))
        return f"{name} has shape {shape}"


def resize_all(draw, call, to=None, among=None):
    """One size, wherever it stands in shapes, on one axis or all, and in attributes."""
    shape = call.inputs[among or an_input(draw, call)].shape
    few = [size for size in shape if 0 < size < 2**20] or list(shape)
    if not shape or to == 0 and 0 in shape:
        return None
    old = draw.one_of(few)
    axes = draw.one_of([range(9), [shape.index(old)]])
    new = another_size(draw, old) if to is None else to
    for name, x in call.inputs.items():
        sizes = [
            new if size == old and axis in axes else size
            for axis, size in enumerate(x.shape)
        ]
        replace(call, name, shape=tuple(sizes))
    if draw.chance() < 0.5:
        for name, value in call.attributes.items():
            if type(value) is int and value == old:
                call.attributes[name] = new
    return f"{old} is {new} on axes {list(axes)}"


def set_attribute(draw, call):
    name = draw.one_of(list(call.attributes))
    value = call.attributes[name]
    if draw.chance() < 0.05:
        value = draw.one_of([1, 1.5, tf.float32])
    elif isinstance(value, tf.DType):
        value = tf.as_dtype(draw.one_of(DTYPES))
    elif isinstance(value, list):
        kinds = RULE_INPUTS if name == "rule" else map(tf.as_dtype, DTYPES)
        value = value + [draw.one_of(list(kinds))]
        del value[draw.random.randrange(len(value))]
        draw.random.shuffle(value)
    elif isinstance(value, float):
        value = draw.one_of(REALS)
    elif draw.chance() < 0.3:
        value = draw.one_of(NEGATIVES)
    else:
        value = another_size(draw, value)
    call.attributes[name] = value
    return f"{name} = {value!r}"


def retype(draw, call):
    name, dtype = an_input(draw, call), draw.one_of(DTYPES)
    with np.errstate(all="ignore"):
        data = call.inputs[name].data.astype(np.float32).astype(np_dtype(dtype))
    replace(call, name, dtype=dtype, data=data)
    return f"{name} is {dtype}"


def change_rank(draw, call):
    name = an_input(draw, call)
    shape = list(call.inputs[name].shape)
    axis = draw.random.randrange(len(shape) + 1)
    kind = draw.one_of(["insert", "drop", "flatten", "scalar", "many"])
    if kind == "insert":
        shape.insert(axis, draw.one_of([0, 1, 2]))
    elif kind == "drop":
        shape = shape[:axis] + shape[axis + 1 :]
    else:
        shape = {"flatten": [elements(shape)], "scalar": [], "many": [1] * 9}[kind]
    replace(call, name, shape=tuple(shape))
    return f"{name} has shape {shape}"


def numbers(x):
    """The array's numbers, which may be written: as int32 where they are its bytes."""
    data = x.data.copy()
    is_bytes = data.dtype == np.uint8 and data.size % 4 == 0 and x.shape[-1:] == (4,)
    return data, data.view(np.int32) if is_bytes else data


def set_values(draw, call):
    """A few values that are out of range, or are not numbers."""
    name = draw.one_of([an_input(draw, call), draw.one_of(call.plan)])
    data, view = numbers(call.inputs[name])
    if not view.size:
        return None
    at = draw.numpy.randint(0, view.size, draw.one_of([1, 1, 3, view.size]))
    if view.dtype.kind in "iu":
        near = int(view.max()) + 1, int(view.min()) - 1
        value = draw.one_of([draw.one_of(INTEGERS), draw.one_of(near)])
        bits = 8 * view.dtype.itemsize
        view[at] = np.array([value % 2**bits], np.dtype(f"u{bits // 8}")).view(
            view.dtype
        )
    else:
        value = draw.one_of(REALS)
        with np.errstate(all="ignore"):
            view[at] = np.float32(value).astype(view.dtype)
    replace(call, name, data=data)
    return f"{name} holds {value} at {at[:5].tolist()}"


def reorder(draw, call):
    """The values of a plan, in another order: an indptr falls, a list does not rise."""
    name = draw.one_of(call.plan)
    data, view = numbers(call.inputs[name])
    kind = draw.one_of(["reverse", "shift", "shuffle", "bits"])
    if kind == "bits" and data.size:
        raw = data.view(np.uint8)
        raw[draw.random.randrange(raw.size)] ^= 1 << draw.random.randrange(8)
    elif kind == "shuffle":
        draw.numpy.shuffle(view)
    else:
        view[:] = view[::-1] if kind == "reverse" else np.roll(view, 1)
    replace(call, name, data=data)
    return f"{name}: {kind}"


def swap(draw, call):
    a, b = an_input(draw, call), an_input(draw, call)
    call.inputs[a], call.inputs[b] = call.inputs[b], call.inputs[a]
    return f"{a} and {b} change places"


def lose(draw, call):
    """An op without one of its inputs or attributes."""
    among = draw.one_of([call.inputs, call.attributes])
    name = draw.one_of(list(among))
    if among is call.attributes or name not in call.plan:
        del among[name]
        return f"there is no {name}"


MUTATIONS = 4 * [resize_all] + 3 * [set_values, set_attribute] + 2 * [resize, reorder]
MUTATIONS += [retype, change_rank, swap, lose]


def keep_small(draw, call):
    """Makes dimensions 0 until no tensor has many elements, however large its sizes."""
    for name in call.inputs:
        while elements(call.inputs[name].shape) > MOST_ELEMENTS:
            note = resize_all(draw, call, to=0, among=name)
            call.notes.append(note)


def call_of(seed):
    """The call of a seed: a valid one where nothing stands in its notes."""
    draw = Draw(seed)
    call = draw.one_of([attention, blocksparse, blocksparse])(draw)
    call.mode = draw.one_of(MODES)
    share = {"constants": 0, "fed": 1, "imported": 0.1}.get(call.mode, 0.5)
    call.fed = [name for name in call.inputs if draw.chance() < share]
    for _ in range(draw.one_of([0, 1, 1, 1, 2, 2, 3, 4])):
        note = draw.one_of(MUTATIONS)(draw, call)
        call.notes += [note] if note else []
    if call.mode != "imported":
        keep_small(draw, call)
    return call


# ---- plans that change while the op runs ----


@functools.lru_cache(maxsize=None)
def rewritten():
    """{(op, name): (a valid call, what another op writes over its input `name`)}.

    The plans are the largest of a few, so that the op is still at work when they change.
    """
    found = {}
    for seed in range(120):
        draw = Draw(seed)
        make, lengths = draw.one_of([(attention, [600]), (blocksparse, [16])])
        call = make(draw, lengths)
        for name in call.plan:
            x = call.inputs[name]
            data, view = numbers(x)
            view[...] = draw.one_of([2**28, -(2**28)])
            largest = found.get((call.op, name), (None, x))[1]
            if elements(x.shape) >= elements(largest.shape) > 0:
                found[call.op, name] = call, x._replace(data=data)
    return found
