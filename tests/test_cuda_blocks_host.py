"""The host's side of the three-op family on CUDA, on the fakes of fake_cuda.py."""

import ctypes

import blocks_abi
import numpy as np
import pytest
from core_abi import check
from fake_cuda import Launch, Machine, aligned, error_of, launches_of, set_int

from sparse_attention.compat.tables import BlocksparseTables
from sparse_attention.native import abi
from sparse_attention.native.cuda import kernels

STREAM, WORKSPACE = 0x5151, 0x10000
BATCH, HEADS, HEAD_DIM = 2, 3, 72


class Calls:
    """Arguments of every call: 3 heads with 5 blocks of 16, of 3 x 4; head_dim 72."""

    def __init__(self, core, arch=90):
        self.library, self.driver = core.library, ctypes.CDLL("libcuda.so.1")
        set_int(self.driver, "capability", arch)
        kernels.attach(core.library)
        layout = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
        tables = BlocksparseTables(
            layout, 16, HEADS, lambda *_: np.ones([16, 16], bool)
        )
        self.memory = aligned(BATCH, 64, HEADS * HEAD_DIM)  # whatever a call points to
        at = self.memory.ctypes.data
        scores, rows = (blocks_abi.array_of(at, d) for d in ("bfloat16", "float16"))
        geometry = blocks_abi.blocks_of(tables, BATCH)
        luts = {
            name: blocks_abi.lut_of(tables, name, at) for name in ("nt", "nn", "tn")
        }
        self.params = {
            name: blocks_abi.Matmul(geometry, lut, HEAD_DIM, scores, rows, rows)
            for name, lut in luts.items()
        }
        softmax = blocks_abi.Softmax(geometry, luts["nn"], 0.5, at, 1, scores, rows)
        softmax.dy = softmax.dx = rows
        self.params["softmax"] = self.params["softmax_grad"] = softmax
        self.params["autoregressive_mask"] = blocks_abi.Mask(
            geometry, luts["nt"], 7, at, at
        )

    def run(self, name):
        params = self.params[name]
        set_int(self.driver, "param_bytes", ctypes.sizeof(params))
        workspace = [ctypes.c_void_p(WORKSPACE)] if "softmax" in name else []
        call = getattr(self.library, f"spattn_blocks_{name}_cuda")
        check(call(ctypes.byref(params), ctypes.c_void_p(STREAM), *workspace))


def launch_all(core, arch):
    calls, done = Calls(core, arch), []
    for name, params in calls.params.items():
        before = len(launches_of(calls.driver))
        calls.run(name)
        for launch in launches_of(calls.driver)[before:]:
            code = launch.code.decode() + " "
            assert launch.stream == STREAM
            got = bytes(launch)[Launch.params.offset :][: ctypes.sizeof(params)]
            assert got == bytes(params)
            if "SHARED_MEMORY" in code:
                assert f"-DSPATTN_SHARED_MEMORY={launch.shared_memory} " in code
            macros = dict(
                word[len("-DSPATTN_") :].split("=")
                for word in code.split()
                if word.startswith("-DSPATTN_")
            )
            kernel = launch.name.decode(), list(launch.grid), launch.threads
            done.append([name, *kernel, macros["DTYPE"], macros.get("SCORES")])
    return done


def test_launches_carry_the_calls(machine):
    """nt multiplies float16, nn and tn float32: their scores are bfloat16."""
    expected = [  # call, kernel, grid, threads, type of the products, type of the scores
        ["nt", "blocks_nt", [2, 3, 2], 128, "1", "2"],
        ["nn", "blocks_xn", [3 * 2, 3, 2], 32, "0", "2"],
        ["tn", "blocks_xn", [4 * 2, 3, 2], 32, "0", "2"],
        ["softmax", "blocks_listed", [1, 1, 1], 1024, "0", None],
        ["softmax", "blocks_softmax", [3 * 2, 3, 2], 256, "0", "2"],
        ["softmax_grad", "blocks_listed", [1, 1, 1], 1024, "0", None],
        ["softmax_grad", "blocks_softmax", [3 * 2, 3, 2], 256, "0", "1"],
        ["autoregressive_mask", "blocks_mask", [1, 1, 1], 256, "0", None],
    ]
    assert machine.run(launch_all, 90) == expected
    assert machine.runs() == 7


def bad_calls(core):
    """What each change of a good call is answered with, by call."""

    def change(path, value):
        errors = {}
        for name in Calls(core).params:
            calls = Calls(core)
            target = calls.params[name]
            *owners, attribute = path.split(".")
            for owner in owners:
                target = getattr(target, owner, None)
            if hasattr(target, attribute):
                setattr(target, attribute, value(getattr(target, attribute)))
                errors[name] = error_of(lambda calls=calls, name=name: calls.run(name))
        return errors

    return {
        "block_size": change("blocks.block_size", lambda size: 24),
        "batch": change("blocks.batch", lambda batch: 65536),
        "entries": change("lut.entries", lambda entries: 2),
        "table": change("lut.data", lambda data: data + 4),
        "large table": change("lut.entries", lambda entries: 2**30 + 1),
        "scores": change("scores.data", lambda data: data + 8),
        "kv dtype": change("kv.dtype", lambda dtype: 0),
        "dy dtype": change("dy.dtype", lambda dtype: 0),
        "dtype": change("y.dtype", lambda dtype: 3),
        "head_dim": change("head_dim", lambda head_dim: 12),
        "mask heads": change("mask_heads", lambda heads: 2),
        "mask": change("mask_out", lambda data: data + 1),
        "key": change("key", lambda key: 64),
    }


@pytest.fixture(scope="module")
def errors(fakes, tmp_path_factory):
    return Machine(fakes, tmp_path_factory.mktemp("bad")).run(bad_calls)


ALL = ("nt", "nn", "tn", "softmax", "softmax_grad", "autoregressive_mask")


@pytest.mark.parametrize(
    "change, calls, message",
    [
        ("block_size", ALL, "block_size must be 8, 16, 32 or 64, got 24"),
        ("batch", ALL[:5], "a GPU's grid holds 2147483647 x 65535 x 65535, got"),
        ("entries", ("nt",), "nt_lut must have blocks=5 entries, got 2"),
        ("entries", ("nn", "softmax"), "nn_lut must have at least 3 entries, got 2"),
        ("entries", ("tn",), "tn_lut must have at least 4 entries, got 2"),
        ("table", ALL, "a table must begin at a multiple of 8 bytes, got 0x"),
        (
            "large table",
            ("nn", "softmax"),
            "have 2^30 entries on a GPU, got 1073741825",
        ),
        ("scores", ALL[:3], "scores must begin at a multiple of 16 bytes, got 0x"),
        (
            "kv dtype",
            ALL[:3],
            "q and kv must have the same dtype on a GPU, got 1 and 0",
        ),
        ("dy dtype", ("softmax_grad",), "y and dy must have the same dtype on a GPU"),
        ("dtype", ("softmax", "softmax_grad"), "dtype must be 0, 1 or 2"),
        ("head_dim", ALL[:3], "head_dim must be a multiple of 8 in [8, 65536], got 12"),
        ("mask heads", ("softmax",), "the mask's heads must be 1 or heads=3, got 2"),
        ("mask", ("autoregressive_mask",), "must begin at a multiple of 2 bytes"),
        ("key", ("autoregressive_mask",), "must be in [0, kv_len=64), got 64"),
    ],
)
def test_bad_calls_are_refused(errors, change, calls, message):
    for name in calls:
        assert message in (errors[change][name] or "nothing"), name


def without_work(core):
    calls = Calls(core)
    for params in calls.params.values():
        params.blocks.batch = 0
    for name in ALL[:5]:
        calls.run(name)
    return [launch.name.decode() for launch in launches_of(calls.driver)]


def test_empty_batch_launches_nothing(machine):
    assert machine.run(without_work) == []


def test_bfloat16_is_multiplied_where_the_gpu_can(machine):
    def dtypes(arch):
        return machine.run(product_dtypes, arch)

    assert dtypes(90) == dtypes(80) == ["-DSPATTN_DTYPE=2"] * 3
    assert dtypes(75) == ["-DSPATTN_DTYPE=0"] * 3


def product_dtypes(core, arch):
    kernels = [
        abi.blocks_kernel_of(
            *(core.library, op, arch, 32, "bfloat16", "bfloat16", "bfloat16", 64)
        )
        for op in ("nt", "nn", "tn")
    ]
    return [kernel.macros.decode().split()[0] for kernel in kernels]
