"""The host's side of the CUDA kernels, on the fakes of fake_cuda.py."""

import ctypes
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from core_abi import (
    BwdParams,
    FwdParams,
    Problem,
    Tensor,
    check,
    kv_plan_of,
    plan_of,
    tensor_of,
)
from fake_cuda import Launch, aligned, error_of, launches_of, set_int

from sparse_attention import build, doctor
from sparse_attention.native import abi, libraries
from sparse_attention.native.cuda import kernels, nvrtc
from sparse_attention.plan.patterns import pattern_block_mask


class TilePlan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("heads", "tiles", "blocks", "entries", "mask_blocks")
    ] + [
        (name, ctypes.c_void_p)
        for name in ("tile_blocks", "indptr", "indices", "mask_ids", "mask_bits")
    ]


class CudaFwdParams(ctypes.Structure):
    _fields_ = (
        [("problem", Problem), ("by_q", TilePlan)]
        + [(name, Tensor) for name in "qkvo"]
        + [("lse", ctypes.c_void_p)]
    )


class CudaMappedFwdParams(ctypes.Structure):
    _fields_ = [
        *(("k", ctypes.c_uint64 * 16), ("v", ctypes.c_uint64 * 16)),
        ("call", CudaFwdParams),
        *((n, ctypes.c_int32) for n in ("tiles", "section_heads")),
        *((n, ctypes.c_int32) for n in ("wave_ctas", "wave_parts")),
    ]


class CudaBwdParams(ctypes.Structure):
    _fields_ = (
        [("problem", Problem), ("by_q", TilePlan), ("by_kv", TilePlan)]
        + [(name, Tensor) for name in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")]
        + [(name, ctypes.c_void_p) for name in ("lse", "dlse", "lse_exp", "delta")]
    )


class CudaDqSums(ctypes.Structure):
    _fields_ = [
        ("dq", ctypes.c_void_p),
        *((n, ctypes.c_int32) for n in ("runs", "run_rows", "starts_with_last")),
        *((n, ctypes.c_void_p) for n in ("copied", "started", "additions", "listed")),
        *((n, ctypes.c_void_p) for n in ("lists", "indices", "mask_ids", "ranks")),
    ]


class CudaMappedBwdParams(ctypes.Structure):
    _fields_ = [
        *(("q", ctypes.c_uint64 * 16), ("dout", ctypes.c_uint64 * 16)),
        *(("call", CudaBwdParams), ("sums", CudaDqSums)),
    ]


class Call:
    """Arguments of a forward and a backward call: 6 heads on 2."""

    STREAM, WORKSPACE = 0x5151, 0x10000

    def __init__(
        self, core, batch=3, arch=90, ptx_arch=0, length=400, head_dims=(64, 64)
    ):
        self.core = core
        self.driver = ctypes.CDLL("libcuda.so.1")
        set_int(self.driver, "capability", arch)
        kernels.attach(core.library, ptx_arch)
        mode = "fixed" if length == 400 else "all"
        self.block_mask = pattern_block_mask(mode, length, 6, 32, 128, num_verts=1)
        self.tiles, self.kv_tiles = abi.plans(
            core.library, [arch], "float16", head_dims, self.block_mask, 3
        )
        dim, dim_v = head_dims
        q, dq = (aligned(batch, length, 6, dim) for _ in range(2))
        o, do = (aligned(batch, length, 6, dim_v) for _ in range(2))
        k, dk = (aligned(batch, length, 2, dim) for _ in range(2))
        v, dv = (aligned(batch, length, 2, dim_v) for _ in range(2))
        self.lse = np.zeros([batch, 6, length], np.float32)
        self.arrays = q, k, v, o, do, dq, dk, dv
        self.problem = core.problem(q, k, v, self.block_mask, None, None)
        self.plan = plan_of(self.tiles, self.block_mask, self.copy)
        self.kv_plan = kv_plan_of(self.kv_tiles, self.block_mask, self.copy)
        q, k, v, o, do, dq, dk, dv = map(tensor_of, self.arrays)
        lse = self.lse.ctypes.data
        self.fwd_params = FwdParams(self.problem, self.plan, q, k, v, o, lse)
        self.bwd_params = BwdParams(
            *(self.problem, self.plan, q, k, v, o, do, lse, None, dq, dk, dv)
        )

    def copy(self, array):
        """The address of a copy at a multiple of 64 bytes."""
        memory = aligned(array.nbytes // 2 + 1)
        ctypes.memmove(memory.ctypes.data, array.ctypes.data, array.nbytes)
        self.copies = [*getattr(self, "copies", []), memory]
        return memory.ctypes.data

    def fwd(self, params=CudaFwdParams):
        set_int(self.driver, "param_bytes", ctypes.sizeof(params))
        check(
            self.core.library.spattn_fwd_cuda(
                ctypes.byref(self.fwd_params),
                self.STREAM,
                ctypes.c_void_p(self.WORKSPACE),
            )
        )

    def bwd(self, params=CudaBwdParams):
        set_int(self.driver, "param_bytes", ctypes.sizeof(params))
        check(
            self.core.library.spattn_bwd_cuda(
                *map(ctypes.byref, (self.bwd_params, self.kv_plan)),
                *(self.STREAM, self.WORKSPACE),
            )
        )

    def workspaces(self):
        """Bytes that the forward and the backward call want."""
        library, sizes = self.core.library, (ctypes.c_int64(-1), ctypes.c_int64(-1))
        fwd, bwd, by_kv, fwd_size, bwd_size = map(
            ctypes.byref, (self.fwd_params, self.bwd_params, self.kv_plan, *sizes)
        )
        check(library.spattn_fwd_cuda_workspace(fwd, fwd_size))
        check(library.spattn_bwd_cuda_workspace(bwd, by_kv, bwd_size))
        return [size.value for size in sizes]

    def launches(self):
        return launches_of(self.driver)


# ---- launches ----


def launch_all(core):
    call = Call(core)
    call.fwd()
    call.bwd()
    fwd, *bwd = call.launches()
    blocks = call.kv_tiles.tile_blocks.shape[1]
    assert [launch.name.decode() for launch in bwd] == [
        *("attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv")
    ]
    rows = 3 * 400 * 6
    grids = [list(launch.grid) for launch in (fwd, *bwd)]
    assert grids == [[4, 6, 3], [-(-rows * 8 // 256), 1, 1], [4, 6, 3], [blocks, 2, 3]]
    for launch in (fwd, *bwd):
        assert (launch.stream, launch.context) == (Call.STREAM, 1)
        assert launch.code.decode().startswith(launch.name.decode() + ".cu -DSPATTN_")
        assert "--gpu-architecture=sm_90a" in launch.code.decode()
        shared = int((launch.code.decode() + " ").split("SHARED_MEMORY=")[-1].split()[0]
                     if b"SHARED" in launch.code else 0)  # fmt: skip
        assert launch.shared_memory == shared
    params = CudaFwdParams.from_buffer_copy(bytes(fwd)[Launch.params.offset :])
    assert_same(params.problem, call.problem)
    assert_same_plan(params.by_q, call.plan, call.plan.kv_indptr, call.plan.kv_indices)
    assert (params.by_q.tiles, params.by_q.blocks) == (4, 13)
    assert not params.by_q.tile_blocks
    for name in "qkvo":
        assert_same(getattr(params, name), getattr(call.fwd_params, name))
    assert params.lse == call.lse.ctypes.data
    for launch in bwd:
        params = CudaBwdParams.from_buffer_copy(bytes(launch)[Launch.params.offset :])
        kv_plan = call.kv_plan
        assert_same_plan(params.by_kv, kv_plan, kv_plan.q_indptr, kv_plan.q_indices)
        assert (params.by_kv.tiles, params.by_kv.blocks) == (blocks, 13)
        assert params.by_kv.tile_blocks == kv_plan.tile_blocks
        for name in ("q", "k", "v", "o", "dout", "dq", "dk", "dv"):
            assert_same(getattr(params, name), getattr(call.bwd_params, name))
        assert (params.lse, params.dlse) == (call.lse.ctypes.data, None)
        assert params.lse_exp == Call.WORKSPACE
        assert params.delta == Call.WORKSPACE + 4 * call.lse.size
    assert call.workspaces() == [0, 2 * 4 * call.lse.size]


def assert_same(a, b):
    assert bytes(a) == bytes(b)


def assert_same_plan(got, plan, indptr, indices):
    assert (got.heads, got.entries, got.mask_blocks) == (
        *(plan.heads, plan.entries, plan.mask_blocks),
    )
    assert (got.indptr, got.indices) == (indptr, indices)
    assert (got.mask_ids, got.mask_bits) == (plan.mask_ids, plan.mask_bits)


def test_launches_carry_the_call(machine):
    machine.run(launch_all)
    lines = [line for line in machine.said.split("\n") if line]
    assert len(lines) == machine.runs() == 4
    for line in lines:
        assert line.startswith("sparse_attention: compiling attention_")
        assert " for sm_90a with NVRTC 12.9, once ... 0." in line


def launch_beside_compilation(core, hold, runs):
    """Whether a compilation was still going on when a loaded kernel was launched."""
    call = Call(core)
    call.fwd()
    open(hold, "w").close()
    held = threading.Thread(target=call.bwd)
    held.start()
    while len(open(runs).read().split()) < 2:
        time.sleep(0.01)
    call.fwd()
    is_held = held.is_alive()
    names = [launch.name.decode() for launch in call.launches()]
    os.remove(hold)
    held.join()
    return is_held, names, len(call.launches())


def test_launches_do_not_wait_for_another_kernels_compilation(machine, tmp_path):
    hold = str(tmp_path / "hold")
    is_held, names, count = machine.run(
        launch_beside_compilation, hold, str(machine.runs_file), FAKE_HOLD=hold
    )
    assert is_held and names == ["attention_fwd", "attention_fwd"] and count == 5


def launch_rules(core, rule):
    """(name, macro of the rule) of each launch, and the workspaces."""
    call = Call(core)
    call.bwd_params.drelative_bias = rule.pop("drelative_bias", None)
    for params in (call.fwd_params, call.bwd_params):
        set_rule(params.rule, rule)
    call.fwd()
    call.bwd()
    found = []
    for launch in call.launches():
        macros = [
            m for m in launch.code.decode().split() if "_RULE=" in m or "SUMS" in m
        ]
        found.append([launch.name.decode(), *macros])
    return found, call.workspaces()


def test_rules_are_prepared_and_have_kernels_of_their_own(machine):
    address = 0x4000
    fwd, bwd = "attention_fwd", ["attention_bwd_dq", "attention_bwd_dkv"]
    delta, rows = ["attention_bwd_delta"], 3 * 6 * 400
    stats = 2 * 4 * rows
    # A workspace's parts begin at multiples of 64 bytes.
    scores = {"logit_softcap": 2.0, "alibi_slopes": address}
    found, workspaces = machine.run(launch_rules, scores)
    three = "-DSPATTN_RULE=3"
    assert found == [[fwd, three], delta, *([name, three] for name in bwd)]
    assert workspaces == [0, stats]

    found, workspaces = machine.run(
        launch_rules, {"dropout_rate": 0.5, "dropout_seed": address}
    )
    words, dropout = ["score_rule_words", "-DSPATTN_RULE=32"], "-DSPATTN_RULE=32"
    assert found == [
        *(words, [fwd, dropout], words, delta),
        *([name, dropout] for name in bwd),
    ]
    assert workspaces == [4 * 3 * rows, stats + 4 * 3 * rows]

    of_keys = {"mask": address, "mask_strides": (400, 0, 0, 1)}
    found, (fwd_bytes, bwd_bytes) = machine.run(launch_rules, of_keys)
    eight = "-DSPATTN_RULE=8"
    ranges, lists = ([f"score_rule_{n}", eight] for n in ("ranges", "lists"))
    assert found == [
        *(ranges, lists, [fwd, eight], ranges, lists, lists, delta),
        *([name, eight] for name in bwd),
    ]
    assert 0 < fwd_bytes < bwd_bytes - stats

    found, _ = machine.run(
        launch_rules, {"mask": address, "mask_strides": (160000, 0, 400, 1)}
    )
    sixteen = "-DSPATTN_RULE=16"
    prepared = [ranges, ["score_rule_pairs", sixteen], lists]
    assert found == [
        *(*prepared, [fwd, sixteen], *prepared, lists, delta),
        *([name, sixteen] for name in bwd),
    ]

    bias = {"relative_bias": address, "bias_heads": 6, "bias_reach": 1000}
    found, (_, bwd_bytes) = machine.run(
        launch_rules, {**bias, "drelative_bias": address}
    )
    four = "-DSPATTN_RULE=4"
    assert found == [
        *([fwd, four], delta, [bwd[0], four, "-DSPATTN_BIAS_SUMS=1"]),
        *(["score_rule_bias", four], [bwd[1], four]),
    ]
    # 12 tiles of queries of three sequences, whose distances are below 402.
    assert bwd_bytes == stats + -(-4 * 12 * 6 * 803 // 64) * 64


class CudaCappedParams(ctypes.Structure):
    _fields_ = [
        *(("call", CudaFwdParams), ("softcap", ctypes.c_float)),
        *(("square", ctypes.c_float), ("terms", ctypes.c_float * 4)),
        ("exponents", ctypes.c_float * 4),
    ]


def terms_of_cap(core, cap):
    """t, and what kernels are given of tanh(t x)."""
    call = Call(core)
    call.fwd_params.rule.logit_softcap = cap
    call.fwd(CudaCappedParams)
    at = Launch.params.offset
    got = CudaCappedParams.from_buffer_copy(bytes(call.launches()[0])[at:])
    scale = got.call.problem.softmax_scale
    return scale / cap, got.square, list(got.terms), list(got.exponents)


@pytest.mark.parametrize("cap", [0.01, 1.5, 50, 3e3, 3e4, 1e6, 1e9, 1e30])
def test_small_logits_have_terms_for_any_cap(machine, cap):
    t, square, terms, exponents = machine.run(terms_of_cap, cap)
    x = np.linspace(-1, 1, 1001) * min(np.sqrt(square), 500)
    assert abs(x[0] * t) > 0.0219 or x[0] == -500
    want = np.tanh(t * x)
    for of, times in ((terms, 1), (exponents, cap * np.log2(np.e))):
        got = x * np.polyval(of[::-1], x * x - square)
        # Far below a high cap scores must not lose what 1.3e-7 of the cap is of them.
        np.testing.assert_allclose(got, times * want, rtol=3e-6 if cap < 2e3 else 3e-7)


def test_rules_that_a_gpu_cannot_count_are_refused(machine):
    for rule in ({"q_offset": 2**30 + 1}, {"q_offset": -(2**30) - 1}):
        error = machine.run(rule_error, {"alibi_slopes": 0x4000, **rule})
        assert "q_offset must be at most 2^30 on a GPU, got 1073741825" in error
    assert "must be given both, got kv_segments alone" in machine.run(
        rule_error, {"kv_segments": 0x4000}
    )
    assert "dropout_rate must be in [0, 1), got 1" in machine.run(
        rule_error, {"dropout_rate": 1.0}
    )


def rule_error(core, rule):
    call = Call(core)
    set_rule(call.fwd_params.rule, rule)
    return error_of(call.fwd)


def set_rule(struct, rule):
    for name, value in rule.items():
        if name == "mask_strides":
            struct.mask_strides[:] = value
        else:
            setattr(struct, name, value)


def launch_at_once(core):
    call = Call(core)
    threads = [threading.Thread(target=call.fwd) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loads = ctypes.c_int.in_dll(call.driver, "loads").value
    return len(call.launches()), loads


def test_a_kernel_that_many_threads_want_is_compiled_once(machine):
    assert machine.run(launch_at_once) == [4, 1]
    assert machine.runs() == 1


def launch_long_lists(core, head_dims, groups, tiles, wave_parts):
    """The parts of 4,400 queries of 18 heads: 132 CTAs have several, the others one."""
    call = Call(core, length=4400, head_dims=head_dims)
    call.fwd(CudaMappedFwdParams)
    set_int(call.driver, "failing_map", 1)
    call.fwd()
    mapped, other = call.launches()
    assert other.name == b"attention_fwd"
    assert mapped.name == b"attention_fwd_sm90"
    ctas = tiles * 18 - 132 * (wave_parts - 1)
    assert (list(mapped.grid), mapped.threads) == ([ctas, 1, 1], (groups + 1) * 128)
    for macro, dim in zip(("HEAD_DIM", "HEAD_DIM_V"), head_dims):
        assert f"-DSPATTN_{macro}={dim} " in mapped.code.decode()
    params = CudaMappedFwdParams.from_buffer_copy(bytes(mapped)[Launch.params.offset :])
    assert_same_plan(
        *(params.call.by_q, call.plan, call.plan.kv_indptr, call.plan.kv_indices)
    )
    assert (params.tiles, params.section_heads) == (tiles, 18)
    assert (params.wave_ctas, params.wave_parts) == (132, wave_parts)
    for name, dim in zip("kv", head_dims):
        address, row = getattr(call.fwd_params, name).data, 2 * dim * 2  # bytes
        sizes, strides = [dim, 4400, 2, 3], [row, row // 2, row * 4400]
        expected = [6, address, *sizes, *strides, 64, 32, 1]
        assert list(getattr(params, name))[:12] == expected


# What is past a head's dim the copy engine makes zero: boxes of 64 columns, a head by itself.
@pytest.mark.parametrize(
    "head_dims, groups, tiles, wave_parts",
    [((64, 64), 3, 24, 2), ((40, 56), 3, 24, 2), ((80, 72), 2, 35, 4)],
)
def test_long_lists_have_a_kernel_of_their_own(
    machine, head_dims, groups, tiles, wave_parts
):
    machine.run(launch_long_lists, head_dims, groups, tiles, wave_parts)


def launch_long_lists_of_queries(core, dim, dim_v):
    call = Call(core, length=4400, head_dims=(dim, dim_v))
    sum_columns = -(-dim // 16) * 16
    call.bwd(CudaMappedBwdParams)
    delta, ranks, bwd, finish = call.launches()
    names = [launch.name.decode() for launch in (delta, ranks, bwd, finish)]
    assert names == [f"attention_bwd_{n}" for n in ("delta", "ranks", "sm90", "finish")]
    kv_tiles = call.kv_tiles.tile_blocks.shape[1]
    assert (list(ranks.grid), ranks.threads) == ([1, 1, 1], 512)
    assert (list(bwd.grid), bwd.threads) == ([kv_tiles * 2 * 3, 1, 1], 384)
    pieces = 4400 * 6 * 3 * sum_columns // 16
    assert (list(finish.grid), finish.threads) == ([-(-pieces // 256), 1, 1], 256)
    for launch in (ranks, bwd, finish):
        at = Launch.params.offset
        params = CudaMappedBwdParams.from_buffer_copy(bytes(launch)[at:])
        kv_plan = call.kv_plan
        assert_same_plan(
            *(params.call.by_kv, kv_plan, kv_plan.q_indptr, kv_plan.q_indices)
        )
        for name, width in (("q", dim), ("dout", dim_v)):
            row = 6 * width * 2  # bytes
            sizes, strides = [width, 4400, 6, 3], [row, width * 2, row * 4400]
            address = getattr(call.bwd_params, name).data
            expected = [6, address, *sizes, *strides, 64, 32, 1]
            assert list(getattr(params, name))[:12] == expected
    # The parts of the workspace, one after the other at multiples of 64 bytes.
    sums, runs = params.sums, -(-4400 // 32)
    assert (sums.runs, sums.run_rows, sums.listed) == (runs, 32, None)
    entries = call.kv_plan.entries
    sizes = dict(
        dq=4 * 3 * 6 * runs * 32 * sum_columns,
        copied=8,
        started=4,
        additions=4 * 3 * 6 * runs,
        lists=8 * kv_tiles,
        indices=4 * entries,
        mask_ids=4 * entries,
        ranks=4 * entries,
    )
    end = Call.WORKSPACE + 2 * 4 * call.lse.size
    for name, size in sizes.items():
        assert getattr(sums, name) == end, name
        end += -(-size // 64) * 64
    assert call.workspaces() == [0, end - Call.WORKSPACE]
    zeroed = list((ctypes.c_uint64 * 2).in_dll(call.driver, "zeroed"))
    assert zeroed == [sums.copied, sums.lists - sums.copied]
    # Where SMs are few for the work, the last tiles start first.
    assert not sums.starts_with_last
    set_int(call.driver, "multiprocessors", 8)
    call.bwd(CudaMappedBwdParams)
    at = Launch.params.offset
    again = CudaMappedBwdParams.from_buffer_copy(bytes(call.launches()[-1])[at:])
    assert again.sums.starts_with_last
    # Without maps, or with a gradient left out, the kernels of short lists run.
    short = ["attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"]
    set_int(call.driver, "failing_map", 1)
    call.bwd()
    assert [launch.name.decode() for launch in call.launches()[8:]] == short
    set_int(call.driver, "failing_map", 0)
    call.bwd_params.dq = Tensor()
    call.bwd()
    assert [launch.name.decode() for launch in call.launches()[11:]] == short[::2]


def launch_long_lists_of_queries_elsewhere(core, arch, rule):
    """The kernels, and the workspace without lse_exp and delta."""
    call = Call(core, arch=arch, length=4400)
    set_rule(call.bwd_params.rule, rule)
    call.bwd()
    names = [launch.name.decode() for launch in call.launches()]
    assert ctypes.c_int.in_dll(call.driver, "memsets").value == 0
    return names, call.workspaces()[1] - 2 * 4 * call.lse.size


@pytest.mark.parametrize("head_dims", [(64, 64), (40, 56), (72, 128)])
def test_long_lists_of_queries_sum_dq_in_whole_16s_of_columns(machine, head_dims):
    machine.run(launch_long_lists_of_queries, *head_dims)


def test_where_long_lists_of_queries_have_no_kernel_of_their_own(machine):
    short = ["attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"]
    bias = {"relative_bias": 0x4000, "bias_heads": 6, "bias_reach": 1000}
    for arch, rule in ((80, {}), (90, {**bias, "logit_softcap": 2.0})):
        got = machine.run(launch_long_lists_of_queries_elsewhere, arch, rule)
        assert got == [short, 0]


def launch_bias_on_long_lists_of_queries(core, reach):
    call = Call(core, length=4400)
    bias = {"relative_bias": 0x4000, "bias_heads": 6, "bias_reach": reach}
    set_rule(call.bwd_params.rule, bias)
    call.bwd_params.drelative_bias = 0x4000
    call.bwd()
    return [launch.name.decode() for launch in call.launches()]


def test_a_wide_table_has_its_gradient_from_the_kernels_of_short_lists(machine):
    """Its sums for each kv tile would take more memory than those of dq."""
    narrow, wide = (
        machine.run(launch_bias_on_long_lists_of_queries, reach)
        for reach in (1000, 10000)
    )
    bwd = ["delta", "ranks", "sm90", "finish"]
    assert narrow == [*(f"attention_bwd_{name}" for name in bwd), "score_rule_bias"]
    delta, dq, dkv = (f"attention_bwd_{name}" for name in ("delta", "dq", "dkv"))
    assert wide == [delta, dq, "score_rule_bias", dkv]


def launch_rules_on_long_lists_of_queries(core, rule):
    """(name, macro of the rule) of each launch, and what of it the sequences have."""
    call = Call(core, length=4400)
    set_rule(call.bwd_params.rule, rule)
    call.bwd(CudaMappedBwdParams)
    launches = call.launches()
    found = [
        [launch.name.decode()]
        + [m for m in launch.code.decode().split() if "_RULE=" in m]
        for launch in launches
    ]
    ranks, bwd, finish = launches[-3:]
    at = Launch.params.offset
    mapped, finished = (
        CudaMappedBwdParams.from_buffer_copy(bytes(launch)[at:])
        for launch in (bwd, finish)
    )
    sums, entries = mapped.sums, call.kv_plan.entries
    zeroed = list((ctypes.c_uint64 * 2).in_dll(call.driver, "zeroed"))
    assert zeroed == [sums.copied, sums.lists - sums.copied]
    sequences = ranks.grid[1]
    end = sums.ranks + -(-4 * sequences * entries // 64) * 64
    assert call.workspaces()[1] == end - Call.WORKSPACE
    for part, after in ((sums.indices, sums.mask_ids), (sums.mask_ids, sums.ranks)):
        assert after - part == -(-4 * sequences * entries // 64) * 64
    lists = 8 * sequences * call.kv_tiles.tile_blocks.shape[1]
    assert sums.indices - sums.lists == -(-lists // 64) * 64
    assert list(ranks.grid) == [1, sequences, 1]
    times = finished.call.problem.softmax_scale / mapped.call.problem.softmax_scale
    # Without maps the kernels of short lists run, which read lists by queries too.
    set_int(call.driver, "failing_map", 1)
    call.bwd()
    others = [launch.name.decode() for launch in call.launches()[len(launches) :]]
    return found, sequences, times, others


def test_rules_on_long_lists_of_queries(machine):
    delta, finish, short = (
        *(["attention_bwd_delta"], ["attention_bwd_finish"]),
        ["attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"],
    )

    def check_rule(rule, prepared, parts, lists, times=1.0):
        ranks = ["attention_bwd_ranks", *(["-DSPATTN_RULE=8"] if lists else [])]
        bwd = ["attention_bwd_sm90", f"-DSPATTN_RULE={parts}"]
        got = machine.run(launch_rules_on_long_lists_of_queries, rule)
        names = [name for name, _ in prepared] + ["score_rule_lists"] * lists
        assert got == [
            [*prepared, delta, ranks, bwd, finish],
            *(3 if lists else 1, times, names + short),
        ]

    address, eight = 0x4000, "-DSPATTN_RULE=8"
    ranges, lists = ([f"score_rule_{n}", eight] for n in ("ranges", "lists"))
    pairs = ["score_rule_pairs", "-DSPATTN_RULE=16"]
    check_rule({"logit_softcap": 2.0, "alibi_slopes": address}, [], 3, False)
    bias = {"relative_bias": address, "bias_heads": 6, "bias_reach": 1000}
    check_rule(bias, [], 4, False)
    words = ["score_rule_words", "-DSPATTN_RULE=32"]
    dropout = {"dropout_rate": 0.5, "dropout_seed": address}
    check_rule(dropout, [words], 32, False, 2.0)
    of_keys = {"mask": address, "mask_strides": (4400, 0, 0, 1)}
    check_rule(of_keys, [ranges, lists], 8, True)
    documents = {"q_segments": address, "kv_segments": address}
    check_rule(documents, [ranges, lists], 8, True)
    of_pairs = {"mask": address, "mask_strides": (4400**2, 0, 4400, 1)}
    check_rule(of_pairs, [ranges, pairs, lists], 16, True)


def workspace_without_device(core):
    call = Call(core, length=4400)
    with_device = call.workspaces()
    ctypes.c_void_p.in_dll(call.driver, "context").value = None
    without = call.workspaces()
    ctypes.c_void_p.in_dll(call.driver, "context").value = 2
    set_int(call.driver, "capability", 80)
    return with_device, without, call.workspaces(), 2 * 4 * call.lse.size


def test_a_workspace_suits_the_device_and_without_one_all(machine):
    """XLA may compile where no device is current; what it has asked for is enough."""
    with_device, without, elsewhere, stats = machine.run(workspace_without_device)
    assert with_device == without and without[1] > stats
    assert elsewhere == [0, stats]


def workspaces_with_shared_mask(core, has_lengths):
    call = Call(core)
    for params in (call.fwd_params, call.bwd_params):
        set_rule(params.rule, {"mask": 0x4000, "mask_strides": [0, 0, 128, 1]})
        params.problem.kv_lengths = 0x4000 if has_lengths else None
    return call.workspaces()


def test_a_workspace_does_not_depend_on_lengths(machine):
    """While XLA compiles they are null: nobody has their values yet."""
    without, with_lengths = (
        machine.run(workspaces_with_shared_mask, has_lengths)
        for has_lengths in (False, True)
    )
    assert without == with_lengths


def leave_out(core):
    call = Call(core)
    call.bwd_params.dq = Tensor()
    call.bwd()
    call.bwd_params.dk = call.bwd_params.dv = Tensor()
    call.bwd()
    return [launch.name.decode() for launch in call.launches()]


def test_null_gradients_are_left_out(machine):
    assert machine.run(leave_out) == [
        *("attention_bwd_delta", "attention_bwd_dkv", "attention_bwd_delta")
    ]


def empty_batch(core):
    call = Call(core, batch=0)
    call.fwd()
    call.bwd()
    return len(call.launches())


def test_empty_batch_launches_nothing(machine):
    assert machine.run(empty_batch) == machine.runs() == 0


# ---- compiling and loading ----


def forward(core):
    call = Call(core)
    call.fwd()
    call.fwd()
    return ctypes.c_int.in_dll(call.driver, "loads").value


def test_kernels_are_compiled_once_and_found_without_nvrtc(machine):
    assert machine.run(forward) == 1
    assert machine.run(forward) == 1
    assert machine.runs() == 1 and machine.said == ""
    assert machine.run(forward, libraries=["driver"], SPARSE_ATTENTION_NO_JIT="1") == 1
    assert machine.run(forward, libraries=["driver", "new_nvrtc"]) == 1  # too new
    assert machine.runs() == 1


def test_damaged_code_is_compiled_again(machine):
    machine.run(forward)
    (code,) = machine.cache.glob("*/attention_fwd.bin")
    whole = code.read_bytes()
    code.write_bytes(whole[:-9])
    machine.run(forward)
    assert machine.runs() == 2 and code.read_bytes() == whole


def two_contexts(core):
    call = Call(core)
    for context in (1, 2, 1):
        ctypes.c_void_p.in_dll(call.driver, "context").value = context
        call.fwd()
    assert [launch.context for launch in call.launches()] == [1, 2, 1]
    return ctypes.c_int.in_dll(call.driver, "loads").value


def test_each_context_loads_its_own(machine):
    assert machine.run(two_contexts) == 2
    assert machine.runs() == 1


def eight_threads(core):
    call = Call(core)
    threads = [threading.Thread(target=call.fwd) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ctypes.c_int.in_dll(call.driver, "loads").value


def test_threads_load_a_kernel_once(machine):
    assert machine.run(eight_threads) == 1
    assert machine.runs() == 1


def forward_ptx(core):
    call = Call(core, ptx_arch=80)
    call.fwd()
    return call.launches()[0].code.decode()


def test_ptx_is_compiled_for_another_architecture(machine):
    code = machine.run(forward_ptx)
    assert code.startswith("PTX attention_fwd.cu") and "compute_80" in code
    assert "-DSPATTN_WGMMA=0" in code


def forward_in_float32(core, arch, allow_tf32):
    call = Call(core, arch=arch)
    problem = call.fwd_params.problem
    problem.dtype, problem.allow_tf32 = 0, allow_tf32
    problem.head_dim = problem.head_dim_v = 16  # the tile fits any GPU
    call.fwd()
    return call.launches()[0].code.decode()


@pytest.mark.parametrize("arch, allow_tf32, runs", [(80, 0, 0), (80, 1, 1), (90, 1, 1)])
def test_float32_takes_tf32_where_it_may_and_can(machine, arch, allow_tf32, runs):
    code = machine.run(forward_in_float32, arch, allow_tf32)
    assert f"-DSPATTN_DTYPE=0 -DSPATTN_TF32={runs}" in code.replace("\n", " ")


def build_ahead(core, more=()):
    sys.modules["tensorflow"] = None  # does not import
    libraries.build_core = lambda: core.library._name
    return build.main(
        "--arch sm_80,sm_90a --dtype float16 --block-size 32 --pattern fixed".split()
        + list(more)
    )


def test_build_compiles_ahead_without_a_gpu(machine):
    assert machine.run(build_ahead, libraries=["nvrtc"]) == 0
    # Tiles of 64 and 128 keys, and the three ops; on sm_90a, of keys long lists and longer
    # ones, and of queries long lists.
    assert machine.runs() == 2 * (5 + 11) + 2 + 3
    machine.run(launch_all_again, libraries=["driver"])
    assert machine.runs() == 37


def launch_all_again(core):
    call = Call(core)
    call.fwd()
    call.bwd()


def build_for_a_wheel(core, folder):
    return build_ahead(core, ["--out", folder])


def launch_with_shipped(core, folder):
    kernels.SHIPPED = folder
    launch_all_again(core)
    return [fact.text for fact in doctor._gpus() if fact.subject == "GPU kernels"]


def test_kernels_that_a_wheel_ships_are_found_before_nvrtc(machine, tmp_path):
    folder, machine.cache = str(tmp_path / "shipped"), tmp_path / "of the builder"
    machine.run(build_for_a_wheel, folder, libraries=["nvrtc"])
    machine.cache = tmp_path / "of the user"
    told = machine.run(launch_with_shipped, folder)
    assert machine.runs() == 37 and machine.said == ""
    assert told == ["37 shipped in the package, 0 in the cache"]
    # What is damaged, or was made of other sources, is compiled as ever.
    for code in (tmp_path / "shipped").glob("*/attention_fwd*.bin"):
        code.write_bytes(b"")
    for code in (tmp_path / "shipped").glob("*/attention_bwd_dkv.bin"):
        code.parent.rename(str(code.parent.parent / "0123456789abcdef-nvrtc12.9"))
        break
    assert machine.run(launch_with_shipped, folder)[0].endswith(" in the cache")
    assert machine.runs() > 34


def test_build_names_what_it_does_not_know(capsys):
    for words, message in (
        (["--arch", "80"], "must be like sm_80, got 80"),
        (["--dtype", "float64"], "must be of float32, float16, bfloat16, got float64"),
        (["--block-size", "24"], "must be of 8, 16, 32, 64, 128, got 24"),
    ):
        with pytest.raises(SystemExit):
            build.main(words)
        assert message in capsys.readouterr().err


def doctors_lines(core):
    return [list(fact) for fact in doctor._gpus()]


def test_doctor_tells_what_there_is(machine):
    machine.run(forward)
    lines = machine.run(doctors_lines)
    assert lines == [
        ["NVIDIA driver", "CUDA 12.4", None],
        ["GPU", "Fake GPU, sm_90a", None],
        ["NVRTC", "12.9 for sm_90a, libnvrtc.so.12", None],
        ["GPU kernels", "0 shipped in the package, 1 in the cache", None],
    ]
    lines = machine.run(doctors_lines, libraries=["driver"])
    assert lines[2][1:] == [
        "none for sm_90a",
        "no NVRTC is installed (`pip install nvidia-cuda-nvrtc-cu12` brings 12.9)",
    ]
    assert machine.run(doctors_lines, libraries=[]) == [
        ["NVIDIA driver", "none", None],
        ["GPU kernels", "0 shipped in the package, 1 in the cache", None],
    ]


# ---- errors ----


def forward_error(core, arch=90, **ints):
    call = Call(core, arch=arch)
    for name, value in ints.items():
        set_int(call.driver, name, value)
    return error_of(call.fwd)


def forward_without_driver(core):
    params = FwdParams(problem=Problem(1, 64, 64, 1, 1, 64, 64, 1, 1, 1))
    params.plan.heads, params.plan.tile_q, params.plan.block_size = 1, 64, 64
    params.plan.q_tiles = params.plan.kv_blocks = 1
    return error_of(
        lambda: check(core.library.spattn_fwd_cuda(ctypes.byref(params), 0, None))
    )


def found_in(core, folder):
    nvrtc.FOLDERS = (folder,)
    try:
        return nvrtc.find_nvrtc("sm_80").path
    except RuntimeError as error:
        return str(error)


def loaded_from(core, folder):
    found_in(core, folder)
    with open("/proc/self/maps") as maps:
        return sorted(
            {os.path.basename(line.split()[-1]) for line in maps if folder in line}
        )


def test_nvrtc_is_found_in_pips_folders(machine, tmp_path):
    folder = str(machine.fakes / "nvrtc")
    found = machine.run(found_in, folder, libraries=[])
    assert found == os.path.join(folder, "libnvrtc.so.12")
    pip = tmp_path / "pip"
    pip.mkdir()
    names = ["libnvrtc-builtins.so.12.9", "libnvrtc.so.12"]
    for name in names:  # NVRTC opens the first by its name alone
        shutil.copy(found, pip / name)
    assert machine.run(loaded_from, str(pip), libraries=[]) == names


@pytest.mark.parametrize(
    "libraries, function, message",
    [
        (["nvrtc"], forward_without_driver, "no NVIDIA driver: libcuda.so.1: cannot open"),
        (["old_driver"], forward_without_driver, "too old: it has no cuLaunchKernel"),
        (["driver", "new_nvrtc"], forward_error, "NVRTC 13.9 is too new for the driver, "
         "which has CUDA 12.4"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(machine, libraries, function, message):
    got = machine.run(function, libraries=libraries)
    assert message in got, got


def test_why_a_kernel_cannot_be_had_is_named(machine):
    got = machine.run(forward_error, libraries=["driver"], SPARSE_ATTENTION_NO_JIT="1")
    assert got == (
        "attention_fwd is not compiled for sm_90a and cannot be: SPARSE_ATTENTION_NO_JIT "
        "is set; where it can, `python -m sparse_attention.build --arch sm_90a` compiles "
        "ahead"
    )
    assert "NVRTC 12.9 does not know sm_75" in machine.run(forward_error, 75)
    (machine.fakes / "broken").mkdir()
    (machine.fakes / "broken" / "libnvrtc.so.12").write_text("no library")
    found = machine.run(found_in, str(machine.fakes / "broken"), libraries=["driver"])
    assert found.startswith("NVRTC does not load: ") and "file too short" in found


def test_compile_errors_are_told(machine):
    got = machine.run(forward_error, FAKE_FAILS="1")
    assert got == (
        "attention_fwd.cu does not compile: attention_fwd.cu(7): error: the fake fails"
    )
    assert "once ... attention_fwd.cu(7): error" in machine.said


def failing_driver(core):
    call = Call(core)
    set_int(call.driver, "failing_load", 1)
    errors = [error_of(call.fwd)]
    set_int(call.driver, "failing_load", 0)
    set_int(call.driver, "failing_launch", 1)
    errors.append(error_of(call.fwd))
    set_int(call.driver, "failing_launch", 0)
    errors.append(error_of(call.fwd))
    ctypes.c_void_p.in_dll(call.driver, "context").value = None
    return [*errors, error_of(call.fwd)]


def test_driver_errors_are_told_and_pass(machine):
    assert machine.run(failing_driver) == [
        "cuModuleLoadData: the fake fails (209)",
        "attention_fwd: the fake fails (700)",
        None,
        "no CUDA context is current",
    ]


def bad_calls(core):
    """What each change of a good call is answered with."""

    def change(path, value):
        call = Call(core)
        *owners, name = path.split(".")
        for params in (call.fwd_params, call.bwd_params, call.kv_plan):
            target = params
            for owner in owners:
                target = getattr(target, owner, None)
            if hasattr(target, name):
                setattr(target, name, value(getattr(target, name)))
        return [error_of(call.fwd), error_of(call.bwd)]

    return {
        "q": change("q.data", lambda data: data + 8),
        "strides": change("k.head_stride", lambda stride: stride + 4),
        "row": change("v.row_stride", lambda stride: 2**30),
        "batch": change("problem.batch", lambda batch: 65536),
        "positions": change("problem.kv_len", lambda kv_len: 2**31 - 9),
        "tiles": change("plan.q_tiles", lambda tiles: tiles - 1),
        "entries": change("plan.entries", lambda entries: 2**29),
        "mask_blocks": change("plan.mask_blocks", lambda blocks: 2**30),
        "mask_bits": change("plan.mask_bits", lambda data: data + 8),
        "mask_ids": change("plan.mask_ids", lambda data: data + 2),
        "head_dim": change("problem.head_dim", lambda head_dim: 12),
        "q_blocks": change("q_blocks", lambda blocks: blocks - 1),
        "tile_kv": change("tile_kv", lambda tile_kv: 16),
        "q_indices": change("q_indices", lambda data: data + 2),
        "kv_tiles": change("kv_tiles", lambda tiles: 0),
        "many kv_tiles": change("kv_tiles", lambda tiles: 2**28),
    }


def test_bad_calls_are_refused_before_a_launch(machine):
    got = machine.run(bad_calls)
    expected = {
        "q": "q must begin at a multiple of 16 bytes, got 0x",
        "strides": "k must have strides in multiples of 8, got 68",
        "row": r"v must have a row stride in [0, 2^31) bytes, got 1073741824 elements",
        "batch": "batch must be at most 65535 on a GPU, got 65536",
        "positions": "kv_len=2147483639 with row_stride=1 must have at most",
        "tiles": "q_tiles must be at least 4 for q_len=400, got 3",
        "entries": "entries of a plan must be at most 2^28 on a GPU, got 536870912",
        "mask_blocks": "mask_blocks of a plan must be at most 67108856 on a GPU, got",
        "mask_bits": "mask_bits must begin at a multiple of 16 bytes, got 0x",
        "mask_ids": "a plan's arrays must begin at multiples of 4 bytes, got 0x",
        "head_dim": "head_dim must be a multiple of 8 in [8, 256], got 12",
    }
    of_keys = {
        "q_blocks": "q_blocks must be at least 13 for q_len=400, got 12",
        "tile_kv": "tile_kv must be 32, 64 or 128, at least block_size=32, got 16",
        "q_indices": "a plan's arrays must begin at multiples of 4 bytes, got 0x",
        "kv_tiles": "must hold 13 kv blocks, got 0",
        "many kv_tiles": "must be at most 1073741696 on a GPU, got 6 * 268435456",
    }
    for name, message in expected.items():
        assert all(error and message in error for error in got[name]), (name, got[name])
    for name, message in of_keys.items():
        assert got[name][0] is None and message in got[name][1], (name, got[name])
    assert (
        machine.runs() == 1
    )  # of the forward calls that a bad plan by keys lets through


def wide_and_bfloat16(core):
    call = Call(core, arch=75)
    call.fwd_params.problem.dtype = 2
    errors = [error_of(call.fwd)]
    call.fwd_params.problem.dtype, call.fwd_params.problem.head_dim = 0, 256
    return [*errors, error_of(call.fwd)]


def test_what_a_gpu_cannot_do_is_told(machine):
    bfloat16, wide = machine.run(wide_and_bfloat16)
    assert bfloat16 == "bfloat16 needs a GPU of compute capability 8.0, this has 7.5"
    assert wide == (
        "attention_fwd with head dims 256 and 64, blocks of 32 and tiles of 64 needs "
        "108800 bytes of shared memory, this GPU (sm_75) has 65536"
    )
