"""csrc/abi/blocksparse.h through ctypes."""

import ctypes

from core_abi import DTYPES


class Blocks(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    ] + [(name, ctypes.c_int64) for name in ("blocks", "q_blocks", "kv_blocks")]


class Lut(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_int32),
        ("entries", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    ]


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class Matmul(ctypes.Structure):
    _fields_ = [("blocks", Blocks), ("lut", Lut), ("head_dim", ctypes.c_int64)] + [
        (name, Array) for name in ("scores", "q", "kv")
    ]


class Softmax(ctypes.Structure):
    _fields_ = [
        ("blocks", Blocks),
        ("lut", Lut),
        ("scale", ctypes.c_float),
        ("mask", ctypes.c_void_p),
        ("mask_heads", ctypes.c_int32),
    ] + [(name, Array) for name in ("x", "y", "dy", "dx")]


class Mask(ctypes.Structure):
    _fields_ = [
        ("blocks", Blocks),
        ("lut", Lut),
        ("key", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_out", ctypes.c_void_p),
    ]


def blocks_of(tables, batch):
    """The SpattnBlocks of `BlocksparseTables`."""
    return Blocks(
        *(batch, tables.heads, tables.blk_size, tables.blocks),
        *(tables.ctx_blks_q, tables.ctx_blks_k),
    )


def lut_of(tables, name, address):
    """The SpattnLut of a table, "nt", "nn" or "tn", that lies at an address."""
    lut = getattr(tables, name + "_lut")
    longest = 0 if name == "nt" else getattr(tables, name + "_max")
    return Lut(len(lut), lut.shape[1], longest, address)


def array_of(address, dtype):
    return Array(address, DTYPES.index(dtype))
