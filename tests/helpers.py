"""What the tests share: the one tolerance, a plain implementation, random cases."""

import importlib
from collections import namedtuple

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sparse_attention.plan import images, masks, reference, tokens, windows
from sparse_attention.plan.block_mask import BlockMask

# The same cases in every run, however busy the machine is.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("fixed")

PATTERNS = ("all", "local", "strided", "fixed")
DTYPES = ("float32", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def np_dtype(name):
    """The NumPy dtype of that name; bfloat16's from ml_dtypes, or from TensorFlow 1."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return np.dtype(importlib.import_module("tensorflow").bfloat16.as_numpy_dtype)


def to_dtype(x, dtype):
    """Rounds to a dtype by way of float32, as TensorFlow's casts do."""
    return np.asarray(x, np.float32).astype(np_dtype(dtype))


def eps(dtype):
    """The distance from 1 to the next number."""
    return EPS[np.dtype(dtype).name]


def assert_close(got, oracle64, plain_same_dtype, factor, sizes=None):
    """The one tolerance: the error of a plain implementation in the same dtype.

    max|got - oracle64| <= factor * max|plain_same_dtype - oracle64|
                           + 2 * eps(dtype) * max|oracle64|

    Args:
      got: The array under test; its dtype is the eps above.
      oracle64: The float64 reference's; where it is not finite, `got` must equal it.
      plain_same_dtype: A plain implementation's on the same inputs.
      factor: 2 for forward results, 3 for gradients.
      sizes: For a few sums of many numbers, which may cancel, the sums of their sizes:
        rounding is in proportion to them, so they take the place of |oracle64|.
    """
    got_eps = eps(got.dtype)
    got, plain = (np.asarray(x).astype(np.float64) for x in (got, plain_same_dtype))
    assert got.shape == oracle64.shape == plain.shape
    is_finite = np.isfinite(oracle64)
    np.testing.assert_array_equal(got[~is_finite], oracle64[~is_finite])
    got, plain, oracle = got[is_finite], plain[is_finite], oracle64[is_finite]

    def largest(x):
        return np.abs(x).max(initial=0)  # NaN if any is

    error = largest(got - oracle)
    scale = largest(oracle if sizes is None else sizes)
    bound = factor * largest(plain - oracle) + 2 * got_eps * scale
    assert error <= bound, f"error {error:.3e} is above {bound:.3e}"


def check_twice_at_most(check):
    """Calls check(seed) with another seed if it fails with the first.

    Which of two implementations has the larger of the largest errors is a matter of luck:
    of random cases about one in 200 exceeds the tolerance. Two in a row are a fault.
    """
    try:
        return check(0)
    except AssertionError as error:
        print(error)
        return check(1)


RESULTS = ("o", "lse", "dq", "dk", "dv")

# ---- plain dense attention ----


def plain_attention_fwd(
    q, k, v, mask=None, softmax_scale=None, kv_lengths=None, tf32=False, **rule
):
    """`reference.attention_fwd` as a framework computes it in the dtype of q.

    Matmuls and softmax are float32; weights and results are rounded. With `tf32` the
    factors of matmuls are TF32, which has 10 bits of fraction.

    Returns:
      o, in q's dtype, and lse, float32.
    """
    p, lse, (_, _, v32), _, rule, _ = _plain_softmax(
        q, k, v, mask, softmax_scale, kv_lengths, tf32, rule
    )
    o = _factor(_round(p * rule.kept, q.dtype), tf32) @ v32
    return _round(o, q.dtype).astype(q.dtype).transpose(0, 2, 1, 3), lse


def plain_attention_bwd(
    q,
    k,
    v,
    mask,
    do,
    dlse=None,
    softmax_scale=None,
    kv_lengths=None,
    tf32=False,
    **rule,
):
    """`reference.attention_bwd` as a framework computes it in the dtype of q.

    Returns:
      dq, dk, dv, in q's dtype; drelative_bias and dsinks in float32, where they are,
      each as a pair with the sums of the sizes of what it sums.
    """
    p, lse, (q32, k32, v32), scale, rule, slope = _plain_softmax(
        q, k, v, mask, softmax_scale, kv_lengths, tf32, rule
    )
    do32 = _factor(_by_head(do), tf32)
    dp = do32 @ v32.swapaxes(2, 3) * rule.kept
    delta = np.sum(p * dp, axis=3, keepdims=True)
    if dlse is not None:
        delta = delta - np.asarray(dlse, np.float32)[..., None]
    ds = p * (dp - delta)
    extra = []
    if rule.bias is not None:
        dbias = np.zeros((2, *rule.bias.shape), np.float32)
        for b, h in np.ndindex(ds.shape[:2]):
            terms, row = _round(ds[b, h], q.dtype), h % len(rule.bias)
            np.add.at(dbias[0, row], rule.bias_index, terms)
            np.add.at(dbias[1, row], rule.bias_index, np.abs(terms))
        if q.dtype.itemsize == 2:
            # Kernels have delta from o as stored, whose rounding moves all ds of a row: a
            # sum by so much. In units of what `assert_close` multiplies sizes with.
            o = p * rule.kept @ v32
            spread = eps(q.dtype) * np.linalg.norm(o * do32, axis=3)
            squares, rows = np.zeros_like(dbias[1]), np.arange(len(p[0, 0]))[:, None]
            for b, h in np.ndindex(ds.shape[:2]):
                moved = np.zeros((len(rows), squares.shape[1]), np.float32)
                weights = p[b, h] * spread[b, h][:, None]
                np.add.at(moved, (rows, rule.bias_index), weights)
                squares[h % len(rule.bias)] += np.sum(moved**2, axis=0)
            dbias[1] += np.sqrt(squares) / (2 * EPS["float32"])
        extra.append(dbias)
    if rule.has_sinks:  # from o as it was stored, added one after another
        o = _round(_factor(_round(p * rule.kept, q.dtype), tf32) @ v32, q.dtype)
        stored = np.sum(o * do32, axis=3)
        if dlse is not None:
            stored = stored - np.asarray(dlse, np.float32)
        with np.errstate(over="ignore"):
            sunk = np.exp(rule.sinks[:, None] - lse) * stored
        sunk = np.where(np.isneginf(lse), np.float32(0), sunk).swapaxes(0, 1)
        sunk = sunk.reshape(len(rule.sinks), -1).astype(np.float32)
        dsinks = -np.cumsum(sunk, axis=1, dtype=np.float32)[:, -1]
        extra.append((dsinks, np.abs(sunk).sum(axis=1)))
    ds = _factor(_round(ds * slope, q.dtype), tf32)
    p = _factor(_round(p * rule.kept, q.dtype), tf32)
    dv = p.swapaxes(2, 3) @ do32
    dq, dk = ds @ k32 * scale, ds.swapaxes(2, 3) @ q32 * scale

    def collect(dx, heads):  # sums the heads that share one
        dx = dx.reshape(dx.shape[0], heads, -1, *dx.shape[2:]).sum(axis=2)
        return _round(dx, q.dtype).astype(q.dtype).transpose(0, 2, 1, 3)

    gradients = zip((dq, dk, dv), (q.shape[2], k.shape[2], v.shape[2]))
    return (*(collect(*pair) for pair in gradients), *extra)


def assert_attention_close(results, inputs, mask, tf32=False, by_row=False, **options):
    """Holds attention to the one tolerance.

    Args:
      results: {name: array}, of RESULTS those that are to be checked.
      inputs: `Inputs`; without dlse, if it is None.
      mask: bool [heads or 1, q_len, kv_len].
      tf32: Whether the factors of products may be TF32.
      by_row: Whether rows are also looked at one by one. The one tolerance follows the
        largest values of a tensor, beside which all of a long list's row may be wrong
        unseen.
      options: `softmax_scale`, `kv_lengths`, and the arguments of `reference.Rule`.
    """
    *qkv, do, dlse = inputs
    oracle, plain = (
        [*fwd(*qkv, mask, **given), *bwd(*qkv, mask, do, dlse, **given)]
        for fwd, bwd, given in (
            (reference.attention_fwd, reference.attention_bwd, options),
            (plain_attention_fwd, plain_attention_bwd, dict(options, tf32=tf32)),
        )
    )
    trained = [name for name in ("relative_bias", "sinks") if name in options]
    for i, name in enumerate((*RESULTS, *("d" + name for name in trained))):
        if name in results:
            factor = 2 if i < 2 else 3
            own, sizes = (plain[i], None) if i < len(RESULTS) else plain[i]
            try:
                assert_close(results[name], oracle[i], own, factor, sizes)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    if by_row:
        sizes = _rows_of_delta(inputs, mask, oracle[0], tf32=tf32, **options)
        _assert_rows_close(results, oracle, plain, sizes)


def _assert_rows_close(results, oracle, plain, sizes):
    """Holds each row of o, dq, dk and dv to a tolerance of its own.

    A row may be off by a fourth of its length, by four times what the plain
    implementation's is off, and by its size in `sizes`.
    """
    for name, want, own, size in zip(RESULTS, oracle, plain, sizes):
        if name == "lse" or name not in results:
            continue
        error = np.linalg.norm(results[name].astype(np.float64) - want, axis=3)
        rows = np.linalg.norm(want, axis=3)
        own_error = np.linalg.norm(own.astype(np.float64) - want, axis=3)
        least = 2.0**-12 * np.sqrt(np.mean(rows**2))  # of a row that cancels to nothing
        excess = error - (rows / 4 + 4 * own_error + size + least)
        at = np.unravel_index(np.argmax(excess), excess.shape)  # the first NaN, if any
        assert excess[at] <= 0, (
            f"{name}: row {at} is off by {error[at]:.3e}, its length is {rows[at]:.3e}"
        )


def _rows_of_delta(inputs, mask, o, tf32, softmax_scale=None, kv_lengths=None, **rule):
    """How far rounding o moves rows of RESULTS: delta is computed from o as stored."""
    q, k, v, do, _ = inputs
    p, _, (q32, k32, _), scale, _, slope = _plain_softmax(
        q, k, v, mask, softmax_scale, kv_lengths, tf32, rule
    )
    products = _by_head(o) * _by_head(do)
    delta = eps(q.dtype) * np.linalg.norm(products, axis=3, keepdims=True)
    ds = p * slope * delta * np.abs(scale)
    dq = np.linalg.norm(ds @ k32, axis=3).swapaxes(1, 2)
    squares = (ds**2).swapaxes(2, 3) @ np.sum(q32**2, axis=3, keepdims=True)
    batch, kv_len, kv_heads = k.shape[:3]
    squares = squares.reshape(batch, kv_heads, -1, kv_len).sum(axis=2)
    return 0, 0, dq, np.sqrt(squares).swapaxes(1, 2), 0


def _factor(x, tf32):
    """float32 `x`, or to the nearest TF32, halves away from 0."""
    if not tf32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _plain_softmax(q, k, v, mask, softmax_scale, kv_lengths, tf32, rule):
    """Weights, lse, the inputs by head, and the scale; all in float32.

    Then the `reference.Rule`, in float32, and the derivative of its scores.
    """
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    scale = np.float32(softmax_scale)
    share = q.shape[2] // k.shape[2]
    q32 = _factor(_by_head(q), tf32)
    k32, v32 = (np.repeat(_factor(_by_head(x), tf32), share, axis=1) for x in (k, v))
    allowed = np.ones([1, 1, 1, k.shape[1]], bool) if mask is None else mask
    if kv_lengths is not None:
        limit = np.reshape(kv_lengths, [-1, 1, 1, 1])
        allowed = allowed & (np.arange(k.shape[1]) < limit)
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    rule = reference.Rule(np.broadcast_to(allowed, shape), **rule)
    rule.kept, rule.sinks = rule.kept.astype(np.float32), rule.sinks.astype(np.float32)
    s, slope = q32 @ k32.swapaxes(2, 3) * scale, np.ones(shape, np.float32)
    for b, h in np.ndindex(shape[:2]):
        s[b, h], slope[b, h] = rule.scores(s[b, h], h)
    s = np.where(rule.allowed, s, np.float32(-np.inf))
    sinks = rule.sinks[:, None, None]
    row_max = np.maximum(s.max(axis=3, keepdims=True), np.finfo(np.float32).min)
    row_max = np.maximum(row_max, sinks)
    p = np.exp(s - row_max)
    row_sum = p.sum(axis=3, keepdims=True) + np.exp(sinks - row_max)
    with np.errstate(divide="ignore"):
        lse = (np.log(row_sum) + row_max)[..., 0]
    return (
        p / np.where(row_sum == 0, np.float32(1), row_sum),
        lse,
        (q32, k32, v32),
        scale,
        rule,
        slope,
    )


def _by_head(x):
    """[batch, len, heads, dim] -> float32 [batch, heads, len, dim]"""
    return np.asarray(x).astype(np.float32).transpose(0, 2, 1, 3)


def _round(x, dtype):
    """float32 -> float32 that the dtype can hold."""
    return x.astype(dtype).astype(np.float32)


# ---- random cases ----


Inputs = namedtuple("Inputs", "q k v do dlse")


def random_inputs(
    seed,
    batch=2,
    q_len=48,
    kv_len=None,
    heads=2,
    kv_heads=None,
    head_dim=16,
    head_dim_v=None,
    dtype="float32",
):
    """Normal q, k, v, do in a dtype and dlse in float32; prints the seed."""
    print("seed", seed)
    random = np.random.RandomState(seed)
    kv_len, kv_heads = kv_len or q_len, kv_heads or heads
    head_dim_v = head_dim_v or head_dim
    shapes = (
        (batch, q_len, heads, head_dim),
        (batch, kv_len, kv_heads, head_dim),
        (batch, kv_len, kv_heads, head_dim_v),
        (batch, q_len, heads, head_dim_v),
    )
    tensors = [to_dtype(random.standard_normal(shape), dtype) for shape in shapes]
    dlse = random.standard_normal((batch, heads, q_len)).astype(np.float32)
    return Inputs(*tensors, dlse)


# What BlockMask takes.
Case = namedtuple("Case", "layout mask block_size q_len kv_len row_stride")


def element_masks():
    """Hypothesis strategy: a mask, one of this library's or combined from two."""
    size = st.integers(1, 40)
    block_size = st.sampled_from([1, 4, 8])
    one = st.one_of(
        st.builds(masks.dense_mask),
        st.builds(masks.causal_mask),
        st.builds(masks.local_mask, size),
        st.builds(masks.strided_mask, size),
        st.builds(masks.chunk_mask, size),
        st.builds(masks.sink_mask, size),
        st.builds(lambda b: masks.fixed_mask(4 * b, b, num_verts=1), block_size),
        st.builds(lambda b: masks.fixed_mask(4 * b, b, num_verts=2), block_size),
        st.builds(windows.window_mask, size, size, st.integers(1, 5)),
        st.builds(windows.window_mask, size, st.none(), st.just([1, 3, 2])),
        st.builds(masks.local_mask, size, st.integers(-20, 20)),
        st.builds(tokens.documents_mask, st.lists(size, min_size=1, max_size=5)),
        st.builds(tokens.global_mask, st.lists(size, unique=True, max_size=30)),
        st.builds(
            images.neighborhood_mask, st.tuples(size, size, size), st.integers(0, 3)
        ),
        st.builds(images.row_column_mask, size),
        st.builds(lambda n: lambda head, q, kv: (q * 3 + kv + head) % n > 0, size),
    ).map(masks.as_mask)
    one = st.one_of(one, one.map(lambda mask: ~mask))
    both = st.builds(lambda a, b: a & b, one, one)
    return st.one_of(one, both, st.builds(lambda a, b: a | b, one, one))


@st.composite
def cases(draw, block_sizes=(8, 16, 32), max_len=100, max_heads=3):
    """Hypothesis strategy: layouts from empty to full, with masks; lengths at will."""
    mask = draw(element_masks())
    block_size = draw(st.sampled_from(block_sizes))
    lengths = q_len, kv_len = draw(st.tuples(*[st.integers(1, max_len)] * 2))
    row_stride = min(draw(st.sampled_from([1, 1, 2, 5, 12])), max(lengths))
    heads = draw(st.integers(2 if mask.tells_heads_apart() else 1, max_heads))
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    random = np.random.RandomState(draw(st.integers(0, 2**31)))
    blocks = [-(-(-(-n // row_stride) * row_stride) // block_size) for n in lengths]
    layout = random.random_sample([heads] + blocks) < density
    return Case(layout, mask, block_size, q_len, kv_len, row_stride)


# ---- rules, written out ----


def drawn(allowed):
    """A matrix of truths as text: "1.. .1. ..1" is the unit matrix of three."""
    return " ".join("".join(".1"[int(x)] for x in row) for row in np.asarray(allowed))


def elements(mask, q_len, kv_len=None, head=0):
    """The mask of all queries and keys of a head."""
    kv_len = q_len if kv_len is None else kv_len
    allowed = mask(head, np.arange(q_len)[:, None], np.arange(kv_len))
    return np.broadcast_to(allowed, [q_len, kv_len])


def assert_plan_follows(rule, layout, mask, block_size, q_len):
    """The plan of a layout and its mask has the rule's elements, and no block too many.

    Args:
      rule: `rule(head, i, j)` -> whether query i attends to key j, of plain ints.
      layout, mask, block_size, q_len: What makes the plan.
    """
    plan = BlockMask(layout, mask, block_size, q_len, q_len)
    want = np.array(
        [
            [[bool(rule(h, i, j)) for j in range(q_len)] for i in range(q_len)]
            for h in range(plan.heads)
        ]
    )
    np.testing.assert_array_equal(plan.to_dense(), want)
    touched = np.zeros(layout.shape, bool)
    head, i, j = np.nonzero(want)
    touched[head, i // block_size, j // block_size] = True
    np.testing.assert_array_equal(layout, touched)


# ---- what a case's plan is to hold ----

NO_ROWS_IN_A_BLOCK = Case(np.ones([1, 2, 2], bool), masks.dense_mask(), 8, 1, 12, 12)


def visited_rows(case):
    """The rows that the q and the kv positions visit, in order; -1: none."""
    for length, blocks in zip((case.q_len, case.kv_len), case.layout.shape[1:]):
        visits = -(-length // case.row_stride)
        residues = range(case.row_stride)
        rows = [n * case.row_stride + b for b in residues for n in range(visits)]
        rows += [length] * (blocks * case.block_size - len(rows))
        yield np.array([row if row < length else -1 for row in rows])


def in_positions(case):
    """allowed and exists, bool [heads, q positions, kv positions]: the definition."""
    q, kv = visited_rows(case)
    computed = case.layout.repeat(case.block_size, 1).repeat(case.block_size, 2)
    exists = np.ones_like(computed) & (q >= 0)[:, None] & (kv >= 0)
    allowed = computed & exists
    for head in range(len(allowed)):
        allowed[head] &= np.asarray(case.mask(head, q[:, None], kv), bool)
    return allowed, exists


def in_blocks(elements, q_size, kv_size):
    """[heads, q_blocks, kv_blocks, q_size, kv_size]; False past the end."""
    heads, q, kv = elements.shape
    padded = np.pad(
        elements, [(0, 0), (0, -q % q_size), (0, -kv % kv_size)], "constant"
    )
    padded = padded.reshape(heads, -(-q // q_size), q_size, -(-kv // kv_size), kv_size)
    return padded.transpose(0, 1, 3, 2, 4)
