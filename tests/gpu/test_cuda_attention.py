"""The CUDA kernels against the float64 reference, on PyTorch tensors.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu
"""

import concurrent.futures
import zlib

import nan_rule
import numpy as np
import pytest
from cases import (
    BATCH,
    CASES,
    DTYPES,
    RULE_CASES,
    VOLTA_CASES,
    VOLTA_RULE_CASES,
    case,
    plans_of,
    random_block_mask,
)
from helpers import (
    assert_attention_close,
    check_twice_at_most,
    random_inputs,
    to_dtype,
)
from require import import_or_skip

from sparse_attention.native import abi
from sparse_attention.plan.patterns import pattern_block_mask

torch = import_or_skip("torch")

from launcher import Attention, load_core, on_device, on_host  # noqa: E402

pytestmark = pytest.mark.gpu


def attention_of(case, block_mask, ptx_arch=0):
    core, (major, minor) = load_core(ptx_arch), torch.cuda.get_device_capability()
    return Attention(
        *(core, block_mask),
        *plans_of(core.library, case, ptx_arch or major * 10 + minor),
        *(case.heads, case.kv_heads, case.softmax_scale, case.allow_tf32, case.rule),
    )


class Run:
    """One case's tensors and results, forward and backward."""

    def __init__(self, case, ptx_arch=0, inputs=None, seed=0):
        self.case = case
        self.block_mask = case.block_mask()
        self.inputs = inputs or random_inputs(
            zlib.crc32(case.name.encode()) + seed,
            BATCH,
            self.block_mask.q_len,
            self.block_mask.kv_len,
            case.heads,
            case.kv_heads,
            case.head_dim,
            case.head_dim_v,
            case.dtype,
        )
        attention = attention_of(case, self.block_mask, ptx_arch)
        q, k, v, do, dlse = map(on_device, self.inputs)
        lengths = case.kv_lengths
        if lengths is not None:
            lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        o, lse = attention.forward(q, k, v, lengths)
        gradients = attention.backward(q, k, v, o, lse, do, dlse, lengths)
        torch.cuda.synchronize()
        names = ("o", "dq", "dk", "dv", "drelative_bias")
        self.results = {n: on_host(x) for n, x in zip(names, (o, *gradients))}
        self.results["lse"] = lse.cpu().numpy()

    def check(self):
        rule = dict(self.case.rule)
        mask = self.block_mask.to_dense() & rule.pop("mask", True)
        assert_attention_close(
            *(self.results, self.inputs, mask),
            kv_lengths=self.case.kv_lengths,
            softmax_scale=self.case.softmax_scale,
            tf32=self.case.allow_tf32,
            by_row=bool(self.case.rule),
            **rule,
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_match_reference(case):
    Run(case).check()


@pytest.mark.parametrize("case", VOLTA_CASES, ids=lambda case: case.name)
def test_volta_kernels_match_reference(case):
    """The sm_70 path as PTX, through the driver's own compiler."""
    Run(case, ptx_arch=70).check()


@pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.name)
def test_rules_match_reference(case):
    check_twice_at_most(lambda seed: Run(case, seed=seed).check())


@pytest.mark.parametrize("case", VOLTA_RULE_CASES, ids=lambda case: case.name)
def test_volta_rules_match_reference(case):
    check_twice_at_most(lambda seed: Run(case, 70, seed=seed).check())


@pytest.mark.parametrize(
    "case", [c for c in RULE_CASES if c.name.startswith("all")], ids=lambda c: c.name
)
def test_rules_are_bitwise_reproducible(case):
    first, second = (Run(case).results for _ in range(2))
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


def test_what_masked_keys_hold_changes_no_bit():
    """With a soft cap, where scores are computed in another way if all logits are small."""
    capped = next(c for c in RULE_CASES if c.name == "padding-long-causal-bfloat16")
    capped = capped._replace(rule=dict(capped.rule, logit_softcap=9.0))
    first = Run(capped)
    q, k, *others = first.inputs
    is_allowed = capped.rule["mask"][:, 0, 0, :, None, None]
    k = np.where(is_allowed, k, (20 * k.astype(np.float32)).astype(k.dtype))
    second = Run(capped, inputs=(q, k, *others))
    for name, x in first.results.items():
        assert x.tobytes() == second.results[name].tobytes(), name


FEATURES = (
    *("tile_q-64", "row-stride", "dim-64", "long-2900-32", "long-1500-8", "long-128"),
    *("long-queries-32", "long-queries-own"),
    *("long-dims-40-40-2900", "long-dims-80-80", "long-dims-64-96"),
    *("long-queries-dims-40-40", "long-queries-dims-80-80", "long-queries-dims-64-96"),
)
FEATURE_CASES = [c for c in CASES if c.name.startswith(FEATURES)]


@pytest.mark.parametrize("case", FEATURE_CASES, ids=lambda case: case.name)
def test_two_runs_are_bitwise_equal(case):
    first, second = (Run(case).results for _ in range(2))
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES + RULE_CASES
        if c.name.startswith(("long-queries", "documents-long-queries"))
        and c.dtype == "bfloat16"
    ],
    ids=lambda case: case.name,
)
def test_order_of_additions_does_not_depend_on_time(case):
    """1,000 times the same bits, while another stream takes SMs away at random."""
    block_mask = case.block_mask()
    attention = attention_of(case, block_mask)
    sizes = BATCH, block_mask.q_len, block_mask.kv_len, case.heads, case.kv_heads
    inputs = random_inputs(0, *sizes, case.head_dim, case.head_dim_v, case.dtype)
    q, k, v, do, dlse = map(on_device, inputs)
    lengths = case.kv_lengths
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    o, lse = attention.forward(q, k, v, lengths)

    def backward():
        return attention.backward(q, k, v, o, lse, do, dlse, lengths)

    first, other = backward(), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    noise = torch.randn(2048, 2048, device="cuda")
    differ = torch.zeros([], dtype=torch.bool, device="cuda")
    for i in range(1000):
        if i % 7 == 0:
            with torch.cuda.stream(other):
                noise = noise @ noise
        for x, y in zip(first, backward()):
            differ |= (x.view(torch.int16) != y.view(torch.int16)).any()
    assert not differ.item()


@pytest.mark.parametrize("has_rule", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_either_order_of_kv_tiles_gives_the_same_but_for_rounding(
    head_dim, block_size, has_rule
):
    """Of many sequences the last tile of each head starts first, of one the first."""
    batch, length, heads = 6, 2048, 16
    block_mask = pattern_block_mask("all", length, heads, block_size, None)
    core, (major, minor) = load_core(), torch.cuda.get_device_capability()
    arch, dims = major * 10 + minor, [head_dim] * 2
    plans = abi.plans(core.library, [arch], "bfloat16", dims, block_mask, 1)
    ids = np.sort(np.random.RandomState(0).randint(0, 3, [batch, length]), axis=1)

    def attention_on(sequences):
        rule = {"alibi_slopes": 0.5 ** np.arange(1.0, heads + 1)}
        rule["segment_ids"] = ids[sequences], ids[sequences]
        return Attention(
            core, block_mask, *plans, heads, rule=rule if has_rule else None
        )

    attention = attention_on(slice(None))
    torch.manual_seed(0)
    q, k, v, do = torch.randn(
        (4, batch, length, heads, head_dim), device="cuda", dtype=torch.bfloat16
    )
    o, lse = attention.forward(q, k, v)
    together = attention.backward(q, k, v, o, lse, do)
    for i in range(batch):
        inputs = (x[i : i + 1] for x in (q, k, v, o, lse, do))
        gradients = attention_on(slice(i, i + 1)).backward(*inputs)
        for many, one in zip(together, gradients):
            rows, alone = many[i].float(), one[0].float()
            assert (rows - alone).abs().max() < 2**-7 * rows.abs().max()
            assert (rows != alone).any() or arch != 90  # the others have one order


def test_streams_and_threads_do_not_disturb_each_other():
    """Each thread has its stream and its own result to come to, over and over."""
    case = next(c for c in CASES if c.name == "dim-64-64-bfloat16")

    def work(seed):
        block_mask = case.block_mask()
        sizes = BATCH, block_mask.q_len, block_mask.kv_len, 2, 2, 64, 64
        inputs = random_inputs(seed, *sizes, case.dtype)
        with torch.cuda.stream(torch.cuda.Stream()):
            first = Run(case, inputs=inputs).results
            for _ in range(5):
                again = Run(case, inputs=inputs).results
                assert all((first[n] == again[n]).all() for n in first)
        return first

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    for seed, results in enumerate(together):
        for name, x in work(seed).items():
            assert x.tobytes() == results[name].tobytes(), name


# wgmma, mma and wmma, by the architecture that the PTX is for; 0: the device's own.
PATHS = {"own": 0, "mma": 80, "volta": 70}
NAN_CASES = [
    pytest.param(case, arch, id=f"{case.name}-{path}")
    for case in FEATURE_CASES
    for path, arch in PATHS.items()
    if path != "volta" or case in VOLTA_CASES
]


@pytest.mark.parametrize("case, ptx_arch", NAN_CASES)
@pytest.mark.parametrize("name", nan_rule.INPUTS)
def test_nan_and_inf_keep_to_the_rule(name, case, ptx_arch):
    plain = Run(case, ptx_arch)

    def run(inputs):
        return Run(case, ptx_arch, inputs).results

    for value in nan_rule.VALUES:
        nan_rule.assert_keeps_to_the_rule(
            *(run, plain.inputs, plain.block_mask.to_dense(), name),
            *(to_dtype(np.array(value), case.dtype), case.kv_lengths),
        )


@pytest.mark.parametrize(
    "case",
    [c for c in RULE_CASES if c.name.startswith("softcap-long-queries")],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("is_of_keys", [False, True])
@pytest.mark.parametrize("name", nan_rule.INPUTS)
def test_nan_and_inf_keep_to_the_rule_of_a_mask(name, is_of_keys, case):
    block_mask, random = case.block_mask(), np.random.RandomState(0)
    rows = 1 if is_of_keys else block_mask.q_len
    allowed = random.random_sample([1, rows, block_mask.kv_len]) < 0.7
    masked = case._replace(rule={"mask": allowed[None], "logit_softcap": 3.0})

    def run(inputs):
        return Run(masked, inputs=inputs).results

    for value in nan_rule.VALUES:
        nan_rule.assert_keeps_to_the_rule(
            *(run, Run(masked).inputs, block_mask.to_dense() & allowed, name),
            to_dtype(np.array(value), case.dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_give_no_nan(dtype):
    case = next(c for c in CASES if c.name == f"row-stride-{dtype}")
    run = Run(case)
    scaled = run.inputs._replace(
        q=run.inputs.q * to_dtype(240, case.dtype),
        k=run.inputs.k * to_dtype(240, case.dtype),
    )
    results = Run(case, inputs=scaled).results
    for name in ("o", "dq", "dk", "dv"):
        assert np.isfinite(results[name].astype(np.float32)).all(), name


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith("long")], ids=lambda case: case.name
)
def test_scores_may_outgrow_those_of_the_first_keys(case):
    """From key to key by up to 2^100, and so often that no shift of exponents lasts."""
    inputs = Run(case).inputs
    growth = np.linspace(1, 8, inputs.k.shape[1])[None, :, None, None]
    q, k = (x.astype(np.float32) for x in (inputs.q, inputs.k))
    q, k = to_dtype(2 * q, case.dtype), to_dtype(growth * k, case.dtype)
    Run(case, inputs=inputs._replace(q=q, k=k)).check()


@pytest.mark.parametrize(
    "head_dim, q_len", [(32, 150), (128, 150), (64, 1500), (80, 1500)]
)
@pytest.mark.parametrize("seed", range(8))
def test_corrupt_plans_stay_in_bounds(seed, head_dim, q_len):
    """Random plan values end without a fault; compute-sanitizer sees the rest.

    1,500 queries are long lists: that attention_bwd_sm90 ends is what this is about.
    """
    random = np.random.RandomState(seed)
    row_stride, tile = (seed % 2 * 3 + 1, None) if head_dim == 32 else (1, 128)
    density = 0.5 if q_len == 150 else 0.95
    block_mask = random_block_mask(
        seed, 16, q_len, 200, 2, row_stride=row_stride, density=density
    )
    sizes = dict(head_dim=head_dim, tile_q=tile, tile_kv=tile)
    corrupt = case("corrupt", lambda: block_mask, "float16", **sizes)
    attention = attention_of(corrupt, block_mask)
    for plan in (attention.tiles, attention.kv_tiles):
        for array in plan[2:-1]:
            bad = random.randint(-(2**31), 2**31 - 1, array.shape, np.int64)
            bad = np.where(random.random_sample(array.shape) < 0.3, 2**31 - 1, bad)
            near = random.randint(-3, 3 + int(array.max()), array.shape, np.int64)
            which = random.random_sample(array.shape)
            values = array.cpu().numpy().astype(np.int64)
            values = np.where(which < 0.1, bad, np.where(which < 0.3, near, values))
            array.copy_(torch.from_numpy(values.astype(np.int32)))
    sizes = BATCH, q_len, 200, 2, 2, head_dim, head_dim
    inputs = random_inputs(seed, *sizes, "float16")
    q, k, v, do = map(on_device, inputs[:4])
    o, lse = attention.forward(q, k, v)
    attention.backward(q, k, v, o, lse, do)
    torch.cuda.synchronize()
