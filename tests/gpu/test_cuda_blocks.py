"""The CUDA kernels of the three-op family against float64, on PyTorch tensors.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu/test_cuda_blocks.py
"""

import zlib

import blocks_oracle as oracle
import numpy as np
import pytest
from blocks_oracle import f32
from cases import BLOCKS_CASES
from helpers import assert_close, to_dtype
from require import import_or_skip

from sparse_attention.compat.tables import BlocksparseTables

torch = import_or_skip("torch")

from launcher import Blocks, load_core, on_device, on_host  # noqa: E402

pytestmark = pytest.mark.gpu

SCALE = 0.3


def tables_of(case):
    layout = oracle.random_layout(1 if case.is_shared else 3)
    mask = oracle.random_mask if case.has_mask else None
    return BlocksparseTables(layout, case.block_size, 3, mask)


class Run:
    """One case's inputs and results: all products and softmaxes."""

    def __init__(self, case, ptx_arch=0):
        seed = zlib.crc32(case.name.encode()) % 1000
        print("seed", seed)
        self.case, self.tables = case, tables_of(case)
        self.q, self.kv = (
            oracle.rows(self.tables, side, case.head_dim, case.dtype, seed)
            for side in ("q", "kv")
        )
        self.w = oracle.blocks_of(self.tables, case.scores, seed + 1)
        self.dy = oracle.blocks_of(self.tables, case.weights, seed + 2)
        blocks = Blocks(load_core(ptx_arch), self.tables)
        q, kv, w, dy = map(on_device, (self.q, self.kv, self.w, self.dy))
        scores, weights = (getattr(torch, d) for d in (case.scores, case.weights))
        y = blocks.softmax(w, SCALE, weights, blocks.mask)
        results = {
            "nt": blocks.nt(q, kv, scores),
            "nn": blocks.nn(w, kv),
            "tn": blocks.tn(w, q),
            "y": y,
            "dx": blocks.softmax_grad(dy, y, SCALE),
        }
        torch.cuda.synchronize()
        self.results = {name: on_host(x) for name, x in results.items()}

    def check(self):
        tables, q, kv, w, dy = self.tables, self.q, self.kv, self.w, self.dy
        y = self.results["y"]
        exact = {
            "nt": oracle.nt(tables, q, kv),
            "nn": oracle.nn(tables, w, kv),
            "tn": oracle.tn(tables, w, q),
            "y": oracle.softmax(tables, w, SCALE),
            "dx": oracle.softmax_grad(tables, dy, y, SCALE),
        }
        plain = {
            "nt": tables.nt_test(f32(q), f32(kv)),
            "nn": tables.nn_test(f32(w), f32(kv)),
            "tn": tables.tn_test(f32(w), f32(q)),
            "y": tables.masked_softmax_test(f32(w), SCALE),
            "dx": tables.masked_softmax_grad_test(f32(dy), f32(y), SCALE),
        }
        for name, got in self.results.items():
            dense = to_dtype(plain[name], got.dtype.name)
            try:
                assert_close(got, exact[name], dense, 3 if name == "dx" else 2)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("case", BLOCKS_CASES, ids=lambda case: case.name)
def test_kernels_match_oracle(case):
    Run(case).check()


@pytest.mark.parametrize("case", BLOCKS_CASES, ids=lambda case: case.name)
def test_volta_kernels_match_oracle(case):
    """The sm_70 path as PTX, through the driver's own compiler."""
    Run(case, ptx_arch=70).check()


@pytest.mark.parametrize("case", BLOCKS_CASES[::5], ids=lambda case: case.name)
def test_two_runs_are_bitwise_equal(case):
    first, second = (Run(case).results for _ in range(2))
    for name, x in first.items():
        assert x.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_long_lists_match_oracle(block_size):
    """Lists that take several tiles, and one that ends in the middle of one."""
    layout = np.tri(9, 11) + np.eye(9, 11, 2) > 0
    tables = BlocksparseTables(layout, block_size, 2)
    blocks = Blocks(load_core(), tables)
    for dtype in ("float32", "float16"):
        q, kv = (oracle.rows(tables, side, 64, dtype, 1) for side in ("q", "kv"))
        w = oracle.blocks_of(tables, dtype, 2)
        x = on_device(w)
        results = (
            blocks.nn(x, on_device(kv)),
            blocks.tn(x, on_device(q)),
            blocks.softmax(x, SCALE, x.dtype),
        )
        exact = (
            oracle.nn(tables, w, kv),
            oracle.tn(tables, w, q),
            oracle.softmax(tables, w, SCALE),
        )
        plain = (
            tables.nn_test(f32(w), f32(kv)),
            tables.tn_test(f32(w), f32(q)),
            tables.masked_softmax_test(f32(w), SCALE),
        )
        for got, want, dense in zip(results, exact, plain):
            assert_close(on_host(got), want, to_dtype(dense, dtype), 2)


def test_masked_softmax_ignores_masked_scores():
    tables = tables_of(next(c for c in BLOCKS_CASES if c.has_mask))
    blocks = Blocks(load_core(), tables)
    x = oracle.blocks_of(tables, "float32", 1)
    poisoned = x.copy()
    hidden = ~oracle.from_dense(tables, oracle.attends(tables)[None])[0]
    poisoned[:, hidden] = np.resize([np.nan, np.inf, 1e30], poisoned[:, hidden].shape)
    clean, got = (
        on_host(blocks.softmax(on_device(s), 0.5, torch.float32, blocks.mask))
        for s in (x, poisoned)
    )
    assert clean.tobytes() == got.tobytes()


def test_softmax_of_query_without_allowed_keys_is_even():
    tables = BlocksparseTables([[[1, 1, 1]]], 8, 1, lambda *_: np.zeros([8, 8], bool))
    blocks = Blocks(load_core(), tables)
    x = on_device(oracle.blocks_of(tables, "bfloat16", 1))
    y = on_host(blocks.softmax(x, 1.0, torch.bfloat16, blocks.mask))
    np.testing.assert_array_equal(
        f32(y), f32(to_dtype(np.full(y.shape, 1 / 24), "bfloat16"))
    )


def test_softmax_takes_negative_and_huge_scores():
    tables = BlocksparseTables(oracle.random_layout(3), 16, 3)
    blocks = Blocks(load_core(), tables)
    x = oracle.blocks_of(tables, "float32", 1) * np.float32(1e30)
    for scale in (-1.0, 0.0, 1e7):
        y = on_host(blocks.softmax(on_device(x), scale, torch.float32))
        plain = tables.masked_softmax_test(x, np.float32(scale))
        assert_close(y, oracle.softmax(tables, x, scale), plain, 2)


def test_one_mask_serves_all_heads():
    """Of tables per head, as of shared ones; and a mask per head serves shared tables."""
    layout, mask = (
        oracle.random_layout(1),
        lambda *at: oracle.random_mask(at[0], 0, *at[2:]),
    )
    results = []
    for shares in (False, True):
        tables = BlocksparseTables(
            layout if shares else layout.repeat(3, 0), 16, 3, mask
        )
        blocks = Blocks(load_core(), tables)
        x = on_device(oracle.blocks_of(tables, "float32", 1))
        for words in (blocks.mask[:1], blocks.mask[:1].expand(3, -1, -1).contiguous()):
            results.append(on_host(blocks.softmax(x, SCALE, torch.float32, words)))
    for y in results[1:]:
        assert y.tobytes() == results[0].tobytes()


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("shared", [False, True])
def test_autoregressive_mask_matches_oracle(block_size, shared):
    layout = oracle.random_layout(1 if shared else 3)
    tables = BlocksparseTables(layout, block_size, 3, oracle.random_mask)
    blocks = Blocks(load_core(), tables)
    last = 4 * block_size - 1
    for key in (0, 1, block_size - 1, block_size, 2 * block_size + 3, last):
        words = blocks.autoregressive_mask(key).cpu().numpy()
        words = words.view(tables.softmax_mask.dtype)
        bits = words[..., None] >> np.arange(block_size, dtype=words.dtype) & 1
        bits = bits.transpose(0, 2, 1, 3).astype(bool)  # [heads, blocks, b, b]
        bits = np.broadcast_to(bits, (3, *bits.shape[1:]))
        want = oracle.from_dense(tables, oracle.attends(tables, key)[None])[0]
        np.testing.assert_array_equal(bits, want)


def corrupted(array, random):
    """The array with some values near those that are right, and some anywhere."""
    values = array.cpu().numpy().astype(np.int64)
    ends = [-(2**31), 2**31 - 1, 2**30, -1, 2**31 - 2]
    wild = np.where(
        random.random_sample(values.shape) < 0.5,
        random.choice(ends, values.shape),
        random.randint(-(2**31), 2**31 - 1, values.shape, np.int64),
    )
    near = random.randint(-3, 4 + int(values.max()), values.shape, np.int64)
    which = random.random_sample(values.shape)
    values = np.where(which < 0.15, wild, np.where(which < 0.4, near, values))
    return torch.from_numpy(values.astype(np.int32)).cuda()


@pytest.mark.parametrize("seed", range(8))
def test_corrupt_tables_stay_in_bounds(seed):
    """Nothing beside the results changes; compute-sanitizer sees what is read."""
    random = np.random.RandomState(seed)
    case = BLOCKS_CASES[seed * 5 % len(BLOCKS_CASES)]
    tables = BlocksparseTables(
        *(oracle.random_layout(3, seed), case.block_size, 3, oracle.random_mask)
    )
    blocks = Blocks(load_core(), tables)
    for name, lut in blocks.luts.items():
        blocks.luts[name] = corrupted(lut, random)
    q, kv = (
        oracle.rows(tables, s, case.head_dim, case.dtype, seed) for s in ("q", "kv")
    )
    w, dy = (oracle.blocks_of(tables, d, seed) for d in (case.scores, case.weights))
    q, kv, w, dy = map(on_device, (q, kv, w, dy))
    calls = {
        "nt": (w, lambda out: blocks.nt(q, kv, w.dtype, out)),
        "nn": (q, lambda out: blocks.nn(w, kv, out)),
        "tn": (kv, lambda out: blocks.tn(w, q, out)),
        "softmax": (
            dy,
            lambda out: blocks.softmax(w, SCALE, dy.dtype, blocks.mask, out),
        ),
        "softmax_grad": (dy, lambda out: blocks.softmax_grad(dy, dy, SCALE, out)),
        "mask": (blocks.mask, lambda out: blocks.autoregressive_mask(3, out)),
    }
    guard = 1 << 16  # elements on both sides
    for name, (like, call) in calls.items():
        memory = torch.full(
            (like.numel() + 2 * guard,), 77, dtype=like.dtype, device="cuda"
        )
        call(memory[guard:-guard].view(like.shape))
        torch.cuda.synchronize()
        assert (memory[:guard] == 77).all() and (memory[-guard:] == 77).all(), name
