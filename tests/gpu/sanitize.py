"""Runs every family of CUDA kernels on small cases, for compute-sanitizer.

Without PyTorch, whose own kernels the sanitizer would spend a minute on, and without a
reference: that results are right, test_cuda_*.py say. What a call writes is NaN before,
and must be none after. Kernels are compiled with line numbers.

    python tests/gpu/sanitize.py --compile                   # all ahead, on all cores
    python tests/gpu/sanitize.py --volta --compile           # needs NVRTC 12
    compute-sanitizer --tool racecheck --num-cuda-barriers 64 \
        python tests/gpu/sanitize.py forward backward
    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --volta short blocks

initcheck wants --fresh: memory is then left as it was allocated.
"""

import argparse
import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import sys

import numpy as np

sys.path[:0] = [os.path.join(os.path.dirname(__file__), *up) for up in ([".."], [])]

import blocks_abi  # noqa: E402
from cases import (  # noqa: E402
    BATCH,
    BLOCKS_CASES,
    CASES,
    RULE_CASES,
    blocks_kernels_of,
    kernels_of,
    plans_of,
    random_block_mask,
    rules_of,
    runs_on_volta,
    whole_tiles,
)
from core_abi import (  # noqa: E402
    BwdParams,
    Core,
    FwdParams,
    Problem,
    Tensor,
    check,
    kv_plan_of,
    plan_of,
    rule_of,
)
from helpers import np_dtype, to_dtype  # noqa: E402

from sparse_attention.compat.tables import BlocksparseTables  # noqa: E402
from sparse_attention.native import abi, libraries  # noqa: E402
from sparse_attention.native.cuda import kernels  # noqa: E402
from sparse_attention.plan.block_mask import BlockMask  # noqa: E402
from sparse_attention.plan.masks import causal_mask  # noqa: E402

# ---- cases ----
#
# The smallest on which each role of a kernel has work, tiles come with and without a
# mask, and the buffers of each ring are filled several times.


def _lists(size, q_len, kv_len, density=0.95):
    return lambda: random_block_mask(6, size, q_len, kv_len, 1, density=density)


def _forward():
    """attention_fwd_sm90 with two and three groups, and several parts to a CTA."""
    one = dict(heads=1, head_dim=64)
    for size, kv_len in ((8, 1400), (32, 1400), (128, 2600)):
        yield whole_tiles(f"two-{size}", _lists(size, 250, kv_len), "bfloat16", **one)
    yield whole_tiles("three", _lists(64, 250, 2600), "float16", **one)
    yield whole_tiles(
        "three-40", _lists(16, 200, 2600), "bfloat16", heads=1, head_dim=40
    )
    late = functools.partial(BlockMask, layout=np.ones([3, 20]), block_size=64)
    ends = dict(q_len=190, kv_len=1270)
    yield whole_tiles(
        "full",  # but for the last keys
        lambda: late(mask=lambda head, q_idx, kv_idx: kv_idx <= q_idx + 1080, **ends),
        "bfloat16",
        **one,
    )
    wide = dict(heads=2, kv_heads=1, kv_lengths=(700, 433))
    for dims in ((128, 128), (80, 112)):
        yield whole_tiles(
            f"wide-{dims[0]}",
            _lists(64, 200, 700),
            "bfloat16",
            head_dim=dims[0],
            head_dim_v=dims[1],
            **wide,
        )
    yield whole_tiles(
        "parts",
        lambda: BlockMask(np.ones([1, 3]), causal_mask(offset=200), 128, 128, 300),
        "float16",
        heads=320,
        kv_heads=4,
        head_dim=128,
    )


def _backward():
    """attention_bwd_sm90 with passing tiles of 64 and of 128 queries."""
    shapes = (8, 64), (32, 64), (128, 64), (64, 128), (128, 128), (16, 80)
    for size, head_dim in shapes:
        yield whole_tiles(
            f"lists-{size}-{head_dim}",
            _lists(size, 1000, 200),
            "bfloat16",
            heads=2,
            kv_heads=1,
            head_dim=head_dim,
        )
    yield whole_tiles(
        "dims-96-64", _lists(32, 1000, 200), "float16", head_dim=96, head_dim_v=64
    )
    yield whole_tiles(
        "lengths",
        _lists(32, 1000, 300),
        "float16",
        heads=1,
        head_dim=64,
        kv_lengths=(0, 201),
    )
    for head_dim in (64, 128):
        yield whole_tiles(
            f"causal-{head_dim}",
            lambda: BlockMask(np.tri(26), causal_mask(), 64, 1650, 1650),
            "bfloat16",
            heads=1,
            head_dim=head_dim,
        )


def _ruled(q_len, kv_len, wanted):
    """wanted: {(head_dim, block size): names of rules}."""
    rules = rules_of(2, q_len, kv_len)
    rules["all"] = {k: v for rule in rules.values() for k, v in rule.items()}
    rules["all"]["q_offset"] = 9
    but_bias = {k: v for k, v in rules["all"].items() if k != "relative_bias"}
    rules["all-but-bias"] = but_bias
    rules["documents"] = {k: v for k, v in but_bias.items() if k != "mask"}
    rules["documents"].pop("logit_softcap")
    for (head_dim, size), names in wanted.items():
        for name in names:
            yield whole_tiles(
                f"{name}-{head_dim}",
                _lists(size, q_len, kv_len),
                "bfloat16",
                head_dim=head_dim,
                rule=rules[name],
            )


def _named(cases, names):
    found = [c for c in cases if c.name in names.split()]
    assert len(found) == len(names.split()), names
    return found


SHORT = """
all-8-float32 fixed-8-float16 strided-16-tf32 all-16-bfloat16 fixed-32-float32
local-32-bfloat16 local-64-float16 strided-64-float32 all-64-bfloat16 fixed-64-tf32
fixed-128-bfloat16 all-128-float16 local-128-float32 dim-8-8-float32
dim-40-40-bfloat16 dim-64-128-bfloat16 dim-128-128-float16 dim-128-128-float32
dim-128-128-tf32 dim-256-256-bfloat16 dim-72-200-float16 tile_q-8-bfloat16
tile_q-32-float32 tile_q-64-bfloat16 tile_q-128-float16 row-stride-float16
row-stride-float32 row-stride-tf32 shared-heads-bfloat16 diagonal-float16
scale-0.3-bfloat16 scale0.0-float32
"""
SHORT_RULES = """
all-own-float16 all-own-float32 all-own-tf32 all-row-stride-float16
all-row-stride-float32 all-shared-heads-bfloat16 all-causal-bfloat16
mask-of-blocks-own-bfloat16 mask-own-float16 dropout-own-bfloat16 bias-own-float32
"""
SELECTIONS = {  # name: (cases, passes)
    "forward": ([*_forward()], ["fwd"]),
    "forward-rules": (
        [
            *_ruled(
                *(150, 1300),
                {
                    (64, 32): ["all", "segments", "mask-of-blocks", "dropout"],
                    (128, 64): ["all-but-bias", "documents", "bias"],
                },
            )
        ],
        ["fwd"],
    ),
    "backward": ([*_backward()], ["bwd"]),
    "backward-rules": (
        [
            *_ruled(
                *(1000, 200),
                {
                    (64, 32): ["all-but-bias", "documents", "segments", "dropout"],
                    (128, 64): ["all-but-bias", "documents", "softcap", "alibi"],
                    (72, 8): ["all-but-bias", "mask-of-blocks", "padding"],
                },
            )
        ],
        ["bwd"],
    ),
    "short": (_named(CASES, SHORT), ["fwd", "bwd"]),
    "short-rules": (_named(RULE_CASES, SHORT_RULES), ["fwd", "bwd"]),
    "blocks": (BLOCKS_CASES[::4], []),
}


def cases_of(selection, is_volta):
    cases, passes = SELECTIONS[selection]
    if is_volta and passes:
        cases = [c for c in cases if runs_on_volta(c)]
    if is_volta and not passes:
        cases = [c for c in cases if "bfloat16" not in (c.dtype, c.scores, c.weights)]
    return cases, passes


def kernels_in(selection, library, is_volta):
    """{(name, macros)} of the kernels that a selection runs, and of few others."""
    cases, passes = cases_of(selection, is_volta)
    found, arch = set(), 70 if is_volta else 90
    for case in cases:
        some = (kernels_of if passes else blocks_kernels_of)(library, case, arch)
        some = {(k.name.decode(), k.macros.decode()) for k in some}
        unused = [f"attention_{phase}" for phase in {"fwd", "bwd"} - {*passes}]
        if any(name == "attention_bwd_sm90" for name, _ in some):
            unused += ["attention_bwd_dq", "attention_bwd_dkv"]
        found |= {k for k in some if not k[0].startswith(tuple(unused))}
    return found


# ---- running ----


class Memory:
    """Device memory by the driver's own functions. Nothing is freed before the end.

    Args:
      is_fresh: Whether memory is left as it was allocated; otherwise all its bits are 1.
    """

    def __init__(self, is_fresh):
        self.driver, self.is_fresh = ctypes.CDLL("libcuda.so.1"), is_fresh
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def _allocate(self, size):
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def new(self, size):
        address = self._allocate(size)
        if not self.is_fresh:
            place = ctypes.c_uint64(address)
            self.call("cuMemsetD8_v2", place, 255, ctypes.c_size_t(max(size, 1)))
        return address

    def put(self, array):
        array = np.ascontiguousarray(array)
        address, size = self._allocate(array.nbytes), ctypes.c_size_t(array.nbytes)
        if array.size:
            source = ctypes.c_void_p(array.ctypes.data)
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, size)
        return address

    def get(self, address, size):
        array = np.empty(size, np.uint8)
        to = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(size)
        self.call("cuMemcpyDtoH_v2", to, ctypes.c_uint64(address), size)
        return array


class Arrays:
    """The tensors of a case. Those that a call writes are `results`."""

    def __init__(self, memory, seed):
        self.memory, self.random = memory, np.random.RandomState(seed)
        self.results = {}  # name: (address, shape, dtype)

    def given(self, shape, dtype, scale=1.0):
        values = scale * self.random.standard_normal(shape)
        return self.memory.put(to_dtype(values, dtype))

    def written(self, name, shape, dtype):
        address = self.memory.new(_size_of(shape, dtype))
        self.results[name] = address, shape, dtype
        return self.results[name][0]

    def read(self):
        """{name: float32 array}, which have no NaN."""
        self.memory.call("cuCtxSynchronize")
        found = {}
        for name, (address, shape, dtype) in self.results.items():
            raw = self.memory.get(address, _size_of(shape, dtype))
            found[name] = raw.view(np_dtype(dtype)).astype(np.float32).reshape(shape)
            assert self.memory.is_fresh or not np.isnan(found[name]).any(), name
        return found


def _size_of(shape, dtype):
    """In bytes."""
    return int(np.prod(shape)) * np_dtype(dtype).itemsize


def _call(core, memory, name, workspace_name, structs):
    structs = [ctypes.byref(struct) for struct in structs]
    size, workspace = ctypes.c_int64(), []
    if workspace_name:
        workspace_of = getattr(core.library, f"spattn_{workspace_name}_workspace")
        check(workspace_of(*structs, ctypes.byref(size)))
        workspace = [ctypes.c_void_p(memory.new(size.value))]
    check(getattr(core.library, f"spattn_{name}")(*structs, None, *workspace))


def run_attention(memory, core, arch, case, passes):
    """{name: array} of what the passes write."""
    arrays, block_mask = Arrays(memory, 0), case.block_mask()
    tiles, kv_tiles = plans_of(core.library, case, arch)
    plan = plan_of(tiles, block_mask, memory.put)
    kv_plan = kv_plan_of(kv_tiles, block_mask, memory.put)
    rule, kept = rule_of(**case.rule)
    for name, array in kept.items():
        setattr(rule, name, memory.put(array))
    batch = BATCH if case.rule or case.kv_lengths else 1
    lengths = case.kv_lengths
    if lengths is not None:
        lengths = memory.put(np.array(lengths, np.int32))
    scale, head_dim = case.softmax_scale, case.head_dim
    problem = Problem(
        *(batch, block_mask.q_len, block_mask.kv_len, case.heads, case.kv_heads),
        *(head_dim, case.head_dim_v, abi.DTYPES.index(case.dtype)),
        *(head_dim**-0.5 if scale is None else scale, block_mask.row_stride),
        *(lengths, case.allow_tf32),
    )
    sides = {
        "q": (block_mask.q_len, case.heads),
        "k": (block_mask.kv_len, case.kv_heads),
    }

    def tensor(place, side, dim):
        rows, heads = sides[side]
        return Tensor(
            place((batch, rows, heads, dim)), rows * heads * dim, heads * dim, dim
        )

    def given(side, dim):
        return tensor(lambda shape: arrays.given(shape, case.dtype), side, dim)

    def written(name, side, dim):
        return tensor(lambda s: arrays.written(name, s, case.dtype), side, dim)

    dim, dim_v = case.head_dim, case.head_dim_v
    q, k, v = given("q", dim), given("k", dim), given("k", dim_v)
    rows = batch, case.heads, block_mask.q_len
    if "fwd" in passes:
        o, lse = written("o", "q", dim_v), arrays.written("lse", rows, "float32")
        params = FwdParams(problem, plan, q, k, v, o, lse, rule)
        _call(core, memory, "fwd_cuda", "fwd_cuda", [params])
    else:
        o = given("q", dim_v)
        lse = memory.put(np.full(rows, 5, np.float32))
    if "bwd" in passes:
        do, dlse = given("q", dim_v), arrays.given(rows, "float32")
        dq, dk = written("dq", "q", dim), written("dk", "k", dim)
        dv = written("dv", "k", dim_v)
        params = BwdParams(problem, plan, q, k, v, o, do, lse, dlse, dq, dk, dv, rule)
        if "relative_bias" in kept:
            shape = kept["relative_bias"].shape
            params.drelative_bias = arrays.written("drelative_bias", shape, "float32")
        _call(core, memory, "bwd_cuda", "bwd_cuda", [params, kv_plan])
    return arrays.read()


def run_blocks(memory, core, case):
    """{op: array} of all ops of the three-op family."""
    heads, dim, size, batch = 3, case.head_dim, case.block_size, 2
    random = np.random.RandomState(0)
    layout = random.random_sample([1 if case.is_shared else heads, 3, 4]) < 0.6
    layout[:, 1] = layout[:, :, 2] = False  # queries without keys, keys without queries
    layout[:, 0, 0] = True
    mask = lambda shape, *_: random.random_sample(shape) < 0.7  # noqa: E731
    tables = BlocksparseTables(layout, size, heads, mask)
    arrays, blocks = Arrays(memory, 0), blocks_abi.blocks_of(tables, batch)
    luts = {
        name: blocks_abi.lut_of(
            tables, name, memory.put(getattr(tables, name + "_lut"))
        )
        for name in ("nt", "nn", "tn")
    }
    words = tables.softmax_mask.view(np.uint8)
    words_at = memory.put(words)
    score_shape = batch, heads, tables.blocks, *tables.blk_shape
    rows = {"q": tables.ctx_blks_q * size, "kv": tables.ctx_blks_k * size}

    def side(place, name):
        address = place((batch, rows[name], heads * dim), case.dtype)
        return blocks_abi.array_of(address, case.dtype)

    def scores(place, dtype):
        return blocks_abi.array_of(place(score_shape, dtype), dtype)

    def written(name):
        return functools.partial(arrays.written, name)

    given = arrays.given
    q, kv, w = side(given, "q"), side(given, "kv"), scores(given, case.scores)
    for name, operands in {
        "nt": (scores(written("nt"), case.scores), q, kv),
        "nn": (w, side(written("nn"), "q"), kv),
        "tn": (w, q, side(written("tn"), "kv")),
    }.items():
        params = blocks_abi.Matmul(blocks, luts[name], dim, *operands)
        _call(core, memory, f"blocks_{name}_cuda", None, [params])
    for is_masked in (False, True):
        y = scores(written(f"y{is_masked:d}"), case.weights)
        params = blocks_abi.Softmax(blocks, luts["nn"], 0.3)
        if is_masked:
            params.mask, params.mask_heads = words_at, len(words)
        params.x, params.y = w, y
        _call(core, memory, "blocks_softmax_cuda", "blocks_softmax_cuda", [params])
    params = blocks_abi.Softmax(blocks, luts["nn"], 0.3)
    params.y, params.dy = y, scores(given, case.weights)
    params.dx = scores(written("dx"), case.weights)
    _call(core, memory, "blocks_softmax_grad_cuda", "blocks_softmax_cuda", [params])
    mask_out = memory.put(np.zeros_like(words))
    params = blocks_abi.Mask(
        *(blocks_abi.blocks_of(tables, 1), luts["nt"], size + 1, words_at, mask_out)
    )
    _call(core, memory, "blocks_autoregressive_mask_cuda", None, [params])
    return arrays.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("selections", nargs="*", default=[*SELECTIONS], metavar="NAME")
    parser.add_argument("--compile", action="store_true", help="and run nothing")
    parser.add_argument("--volta", action="store_true", help="the sm_70 path as PTX")
    parser.add_argument("--fresh", action="store_true", help="for initcheck")
    parser.add_argument("-k", default="", help="parts of the names of the cases")
    options = parser.parse_args()
    compile_options = kernels.options
    kernels.options = lambda *args: [*compile_options(*args), "--generate-line-info"]
    core = Core(libraries.build_core())
    if options.compile:
        target = "compute_70" if options.volta else "sm_90a"
        wanted = set()
        for name in options.selections:
            wanted |= kernels_in(name, core.library, options.volta)
        forks = multiprocessing.get_context("fork")  # they keep `kernels.options`
        compiled = functools.partial(kernels.compiled, arch=target)
        with concurrent.futures.ProcessPoolExecutor(mp_context=forks) as pool:
            list(pool.map(compiled, *zip(*sorted(wanted))))
        print(len(wanted), "kernels for", target)
        return
    memory, arch = Memory(options.fresh), 70 if options.volta else 90
    kernels.attach(core.library, 70 if options.volta else 0)
    count = 0
    for name in options.selections:
        cases, passes = cases_of(name, options.volta)
        for case in cases:
            if not any(part in case.name for part in options.k.split(",")):
                continue
            if passes:
                run_attention(memory, core, arch, case, passes)
            else:
                run_blocks(memory, core, case)
            count += 1
            print(name, case.name, "ran", flush=True)
    print(count, "cases ran")


if __name__ == "__main__":
    main()
