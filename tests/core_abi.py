"""csrc/abi/core.h through ctypes: the kernels without TensorFlow."""

import ctypes
import threading

import numpy as np

from sparse_attention.native.abi import DTYPES, Status


class Problem(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "q_len", "kv_len")]
        + [(name, ctypes.c_int32) for name in ("heads", "kv_heads")]
        + [(name, ctypes.c_int32) for name in ("head_dim", "head_dim_v", "dtype")]
        + [("softmax_scale", ctypes.c_float), ("row_stride", ctypes.c_int64)]
        + [("kv_lengths", ctypes.c_void_p), ("allow_tf32", ctypes.c_int32)]
    )


class ScoreRule(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_float) for name in ("logit_softcap", "dropout_rate")]
        + [("q_offset", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("alibi_slopes", "relative_bias")]
        + [(name, ctypes.c_int64) for name in ("bias_heads", "bias_reach")]
        + [(name, ctypes.c_void_p) for name in ("q_segments", "kv_segments", "mask")]
        + [("mask_strides", ctypes.c_int64 * 4), ("dropout_seed", ctypes.c_void_p)]
    )


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch_stride", "row_stride", "head_stride")
    ]


class Plan(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in ("heads", "tile_q", "block_size")]
        + [(name, ctypes.c_int64) for name in ("q_tiles", "kv_blocks")]
        + [(name, ctypes.c_int64) for name in ("entries", "mask_blocks")]
        + [(name, ctypes.c_void_p) for name in ("kv_indptr", "kv_indices")]
        + [(name, ctypes.c_void_p) for name in ("mask_ids", "mask_bits")]
    )


class KvPlan(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int32) for name in ("heads", "block_size", "tile_kv")]
        + [(name, ctypes.c_int64) for name in ("kv_tiles", "q_blocks")]
        + [(name, ctypes.c_int64) for name in ("entries", "mask_blocks")]
        + [(name, ctypes.c_void_p) for name in ("tile_blocks", "q_indptr")]
        + [(name, ctypes.c_void_p) for name in ("q_indices", "mask_ids", "mask_bits")]
    )


RUN = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p
)


class Threads(ctypes.Structure):
    _fields_ = [
        ("workers", ctypes.c_int32),
        ("pool", ctypes.c_void_p),
        ("run", ctypes.c_void_p),
    ]


class FwdParams(ctypes.Structure):
    _fields_ = (
        [("problem", Problem), ("plan", Plan)]
        + [(name, Tensor) for name in ("q", "k", "v", "o")]
        + [("lse", ctypes.c_void_p), ("rule", ScoreRule)]
    )


class BwdParams(ctypes.Structure):
    _fields_ = (
        [("problem", Problem), ("plan", Plan)]
        + [(name, Tensor) for name in ("q", "k", "v", "o", "dout")]
        + [("lse", ctypes.c_void_p), ("dlse", ctypes.c_void_p)]
        + [(name, Tensor) for name in ("dq", "dk", "dv")]
        + [("rule", ScoreRule), ("drelative_bias", ctypes.c_void_p)]
    )


class InvalidArgument(ValueError):
    """The core returned a status; its message."""


@RUN
def _run_in_threads(pool, workers, work, arg):
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)(work)
    threads = [threading.Thread(target=call, args=(arg, w)) for w in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def tensor_of(array):
    """[batch, rows, heads, dim] with dim contiguous; strides in elements."""
    size = array.itemsize
    if array.size and array.strides[3] != size:
        raise ValueError("dim must be contiguous, got strides %s" % (array.strides,))
    return Tensor(array.ctypes.data, *(s // size for s in array.strides[:3]))


def pointer_of(array):
    if not array.flags.c_contiguous:
        raise ValueError("a plan's arrays must be contiguous")
    return array.ctypes.data


def plan_of(tiles, block_mask, pointer=pointer_of):
    """The SpattnPlan of a `Tiles`; keep `tiles` alive while it is used."""
    lists = len(tiles.kv_indptr) - 1
    return Plan(
        *(block_mask.heads, tiles.tile_q, tiles.block_size),
        *(lists // block_mask.heads, block_mask.kv_blocks),
        *(len(tiles.kv_indices), len(tiles.mask_bits)),
        *map(pointer, tiles[2:]),
    )


def kv_plan_of(kv_tiles, block_mask, pointer=pointer_of):
    """The SpattnKvPlan of a `KvTiles`; keep `kv_tiles` alive while it is used."""
    lists = len(kv_tiles.q_indptr) - 1
    return KvPlan(
        *(block_mask.heads, kv_tiles.block_size, kv_tiles.tile_kv),
        *(lists // block_mask.heads, block_mask.q_blocks),
        *(len(kv_tiles.q_indices), len(kv_tiles.mask_bits)),
        *map(pointer, kv_tiles[2:]),
    )


def rule_of(
    logit_softcap=None,
    alibi_slopes=None,
    relative_bias=None,
    segment_ids=None,
    mask=None,
    dropout_rate=0.0,
    dropout_seed=None,
    q_offset=0,
):
    """The ScoreRule of arrays, and the arrays, which must live as long as it is used.

    mask is bool [batch or 1, heads or 1, q_len or 1, kv_len or 1]; the others are as
    `reference.Rule` has them.
    """
    rule = ScoreRule(logit_softcap or 0, dropout_rate, q_offset)
    kept = {}

    def set_array(name, array, dtype):
        if array is not None:
            kept[name] = np.ascontiguousarray(array, dtype)
            setattr(rule, name, kept[name].ctypes.data)

    set_array("alibi_slopes", alibi_slopes, np.float32)
    set_array("relative_bias", relative_bias, np.float32)
    if relative_bias is not None:
        rule.bias_heads, width = kept["relative_bias"].shape
        rule.bias_reach = (width + 1) // 2
    for name, ids in zip(("q_segments", "kv_segments"), segment_ids or ()):
        set_array(name, ids, np.int32)
    set_array("mask", mask, np.bool_)
    if mask is not None:
        strides = zip(kept["mask"].shape, kept["mask"].strides)
        rule.mask_strides[:] = [0 if size == 1 else stride for size, stride in strides]
    set_array("dropout_seed", dropout_seed, np.int64)
    return rule, kept


class Core:
    """A loaded core library.

    Args:
      path: The shared library that `libraries.build_core()` made.
    """

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.spattn_cpu_isa.restype = ctypes.c_char_p
        for name in (
            *("fwd_cpu", "fwd_cpu_workspace", "bwd_cpu", "bwd_cpu_workspace"),
            *("fwd_cuda", "fwd_cuda_workspace", "bwd_cuda", "bwd_cuda_workspace"),
            *("blocks_nt_cuda", "blocks_nn_cuda", "blocks_tn_cuda"),
            *("blocks_softmax_cuda", "blocks_softmax_grad_cuda"),
            *("blocks_softmax_cuda_workspace", "blocks_autoregressive_mask_cuda"),
        ):
            getattr(self.library, "spattn_" + name).restype = Status

    def isa(self):
        return self.library.spattn_cpu_isa().decode()

    def _call(self, phase, params, workers):
        run = ctypes.cast(_run_in_threads, ctypes.c_void_p)
        threads = Threads(workers, None, run)
        size = ctypes.c_int64(-1)
        workspace_of = getattr(self.library, "spattn_%s_cpu_workspace" % phase)
        check(workspace_of(ctypes.byref(params), workers, ctypes.byref(size)))
        workspace = np.full(size.value + 64, 0xFF, np.uint8)  # NaN where read too soon
        base = -(-workspace.ctypes.data // 64) * 64
        call = getattr(self.library, "spattn_%s_cpu" % phase)
        arguments = ctypes.byref(params), ctypes.byref(threads), ctypes.c_void_p(base)
        self._run(lambda: check(call(*arguments)))

    def _run(self, call):
        call()

    def problem(self, q, k, v, block_mask, softmax_scale, kv_lengths):
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        return Problem(
            *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2]),
            *(q.shape[3], v.shape[3], DTYPES.index(q.dtype.name), scale),
            *(
                block_mask.row_stride,
                None if kv_lengths is None else kv_lengths.ctypes.data,
            ),
        )

    def fwd(self, q, k, v, block_mask, tiles=None, plan=None, workers=1, **kwargs):
        """o, lse of [batch, len, heads, dim] arrays, their dtype one of DTYPES."""
        tiles = tiles or block_mask.tiles()
        softmax_scale, kv_lengths = (
            kwargs.get("softmax_scale"),
            kwargs.get("kv_lengths"),
        )
        o = np.empty(q.shape[:3] + v.shape[3:], q.dtype)
        lse = np.empty((q.shape[0], q.shape[2], q.shape[1]), np.float32)
        params = FwdParams(
            self.problem(q, k, v, block_mask, softmax_scale, kv_lengths),
            plan or plan_of(tiles, block_mask),
            *[tensor_of(x) for x in (q, k, v, o)],
            lse.ctypes.data,
        )
        params.rule, kept = rule_of(**kwargs.get("rule", {}))
        self._call("fwd", params, workers)
        return o, lse

    def bwd(
        self, q, k, v, o, lse, do, block_mask, dlse=None, tiles=None, plan=None,
        workers=1, **kwargs
    ):  # fmt: skip
        """dq, dk, dv, and drelative_bias where there is one."""
        tiles = tiles or block_mask.tiles()
        softmax_scale, kv_lengths = (
            kwargs.get("softmax_scale"),
            kwargs.get("kv_lengths"),
        )
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        params = BwdParams(
            self.problem(q, k, v, block_mask, softmax_scale, kv_lengths),
            plan or plan_of(tiles, block_mask),
            *[tensor_of(x) for x in (q, k, v, o, do)],
            lse.ctypes.data,
            None if dlse is None else dlse.ctypes.data,
            *[tensor_of(x) for x in (dq, dk, dv)],
        )
        params.rule, kept = rule_of(**kwargs.get("rule", {}))
        extra = ()
        if "relative_bias" in kept:
            extra = (np.full_like(kept["relative_bias"], np.nan),)
            params.drelative_bias = extra[0].ctypes.data
        self._call("bwd", params, workers)
        return (dq, dk, dv, *extra)


def check(status):
    if status.code != 0:
        raise InvalidArgument(status.message.decode())
