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


FEATURE_CASES = [
    c
    for c in CASES
    if c.name.startswith(
        ("tile_q-64", "row-stride", "dim-64", "long-2900-32", "long-1500-8", "long-128")
    )
]


@pytest.mark.parametrize("case", FEATURE_CASES, ids=lambda case: case.name)
def test_two_runs_are_bitwise_equal(case):
    first, second = (Run(case).results for _ in range(2))
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


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


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("seed", range(8))
def test_corrupt_plans_stay_in_bounds(seed, head_dim):
    """Random plan values end without a fault; compute-sanitizer sees the rest."""
    random = np.random.RandomState(seed)
    row_stride, tile = (seed % 2 * 3 + 1, None) if head_dim == 32 else (1, 128)
    block_mask = random_block_mask(seed, 16, 150, 200, 2, row_stride=row_stride)
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
    inputs = random_inputs(seed, BATCH, 150, 200, 2, 2, head_dim, head_dim, "float16")
    q, k, v, do = map(on_device, inputs[:4])
    o, lse = attention.forward(q, k, v)
    attention.backward(q, k, v, o, lse, do)
    torch.cuda.synchronize()
