"""Runs the core's CUDA functions on PyTorch tensors: no TensorFlow, no CUDA toolkit."""

import ctypes
import functools
import shutil
import tempfile

import blocks_abi
import numpy as np
import torch
from core_abi import (
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

from sparse_attention.native import abi, libraries
from sparse_attention.native.cuda import kernels


@functools.lru_cache(maxsize=None)
def load_core(ptx_arch=0):
    """A `Core` for each `ptx_arch`, its kernels from NVRTC; see `kernels.attach`."""
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        shutil.copy(libraries.build_core(), copy.name)
        core = Core(copy.name)
    kernels.attach(core.library, ptx_arch)
    torch.zeros(1, device="cuda")  # makes the context current
    return core


def on_device(x):
    """NumPy to the GPU, by way of float32."""
    tensor = torch.from_numpy(np.array(x, np.float32)).cuda()
    return tensor.to(getattr(torch, x.dtype.name))


def on_host(x):
    """A tensor to NumPy, by way of float32."""
    from helpers import to_dtype  # not for benchmarks, which have no Hypothesis

    return to_dtype(x.float().cpu().numpy(), _dtype(x))


def _stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _dtype(x):
    return str(x.dtype).split(".")[1]


def _tensor(x):
    """[batch, rows, heads, dim] of any strides, dim contiguous; None: no data."""
    return Tensor() if x is None else Tensor(x.data_ptr(), *x.stride()[:3])


class Attention:
    """One BlockMask's plans on the device.

    Args:
      core: What `load_core` returns.
      block_mask: `BlockMask`.
      tiles, kv_tiles: Its plans, as `abi.plans` chooses them.
      rule: The arguments of `core_abi.rule_of`.
    """

    def __init__(
        self,
        core,
        block_mask,
        tiles,
        kv_tiles,
        heads,
        kv_heads=None,
        softmax_scale=None,
        allow_tf32=False,
        rule=None,
    ):
        self.core, self.block_mask = core, block_mask
        self.allow_tf32 = allow_tf32
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.softmax_scale = softmax_scale
        self.tiles, self.kv_tiles = (
            plan._make(
                plan[:2] + tuple(torch.tensor(a, device="cuda") for a in plan[2:])
            )
            for plan in (tiles, kv_tiles)
        )
        self.plan = plan_of(self.tiles, block_mask, _pointer)
        self.kv_plan = kv_plan_of(self.kv_tiles, block_mask, _pointer)
        self.rule, arrays = rule_of(**rule or {})
        self.rule_arrays = {
            n: torch.tensor(a, device="cuda") for n, a in arrays.items()
        }
        for name, array in self.rule_arrays.items():
            setattr(self.rule, name, array.data_ptr())

    def _problem(self, q, k, v, kv_lengths):
        scale, head_dim = self.softmax_scale, q.shape[3]
        return Problem(
            *(q.shape[0], q.shape[1], k.shape[1], self.heads, self.kv_heads),
            *(head_dim, v.shape[3], abi.DTYPES.index(_dtype(q))),
            *(head_dim**-0.5 if scale is None else scale, self.block_mask.row_stride),
            *(_pointer(kv_lengths), self.allow_tf32),
        )

    def _call(self, name, structs):
        structs = [ctypes.byref(struct) for struct in structs]
        function, workspace_of = (
            getattr(self.core.library, "spattn_" + name + suffix)
            for suffix in ("", "_workspace")
        )
        size = ctypes.c_int64()
        check(workspace_of(*structs, ctypes.byref(size)))
        # All ones: NaN where read too soon.
        workspace = torch.full((size.value,), 255, dtype=torch.uint8, device="cuda")
        check(function(*structs, _stream(), ctypes.c_void_p(workspace.data_ptr())))

    def forward(self, q, k, v, kv_lengths=None, out=None):
        """o [batch, q_len, heads, head_dim_v] and lse float32 [batch, heads, q_len]."""
        if out is None:
            o = q.new_full((*q.shape[:3], v.shape[3]), float("nan"))
            lse = torch.full(
                (q.shape[0], self.heads, q.shape[1]), float("nan"), device="cuda"
            )
            out = o, lse
        params = FwdParams(
            *(self._problem(q, k, v, kv_lengths), self.plan),
            *map(_tensor, (q, k, v, out[0])),
            *(out[1].data_ptr(), self.rule),
        )
        self._call("fwd_cuda", [params])
        return out

    def backward(self, q, k, v, o, lse, do, dlse=None, kv_lengths=None, out=None):
        """dq, dk, dv; those that are None in `out` are left out.

        With a relative_bias in the rule, its gradient too.
        """
        if out is None:
            out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
            if "relative_bias" in self.rule_arrays:
                bias = self.rule_arrays["relative_bias"]
                out.append(torch.full_like(bias, float("nan")))
        params = BwdParams(
            *(self._problem(q, k, v, kv_lengths), self.plan),
            *map(_tensor, (q, k, v, o, do)),
            *map(_pointer, (lse, dlse)),
            *map(_tensor, out[:3]),
            *(self.rule, *map(_pointer, out[3:])),
        )
        self._call("bwd_cuda", [params, self.kv_plan])
        return out


class Blocks:
    """The three-op family on one `BlocksparseTables`.

    Each call writes `out`, or else a new tensor that is NaN before.

    Attributes:
      luts: {"nt", "nn", "tn": int32 tensor}, changed at will.
      mask: uint8 tensor, the bytes of the tables' mask; or None.
    """

    def __init__(self, core, tables):
        self.core, self.tables = core, tables
        self.luts = {
            name: torch.tensor(getattr(tables, name + "_lut"), device="cuda")
            for name in ("nt", "nn", "tn")
        }
        self.mask = None
        if tables.softmax_mask is not None:
            self.mask = torch.tensor(tables.softmax_mask.view(np.uint8), device="cuda")

    def _lut(self, name):
        return blocks_abi.lut_of(self.tables, name, self.luts[name].data_ptr())

    def _blocks(self, batch):
        return blocks_abi.blocks_of(self.tables, batch)

    def _call(self, name, params, *workspace):
        function = getattr(self.core.library, f"spattn_blocks_{name}_cuda")
        check(function(ctypes.byref(params), _stream(), *workspace))

    def _matmul(self, name, scores, q, kv):
        batch, _, width = q.shape
        params = blocks_abi.Matmul(
            *(self._blocks(batch), self._lut(name), width // self.tables.heads),
            *map(_array, (scores, q, kv)),
        )
        self._call(name, params)

    def nt(self, q, kv, dtype, out=None):
        """scores, of a torch dtype."""
        shape = len(q), self.tables.heads, self.tables.blocks, *self.tables.blk_shape
        out = _new(out, shape, dtype)
        self._matmul("nt", out, q, kv)
        return out

    def nn(self, scores, kv, out=None):
        rows = self.tables.ctx_blks_q * self.tables.blk_size
        out = _new(out, (len(kv), rows, kv.shape[2]), kv.dtype)
        self._matmul("nn", scores, out, kv)
        return out

    def tn(self, scores, q, out=None):
        rows = self.tables.ctx_blks_k * self.tables.blk_size
        out = _new(out, (len(q), rows, q.shape[2]), q.dtype)
        self._matmul("tn", scores, q, out)
        return out

    def _softmax(self, name, batch, scale, mask, **arrays):
        params = blocks_abi.Softmax(self._blocks(batch), self._lut("nn"), scale)
        if mask is not None:
            params.mask, params.mask_heads = mask.data_ptr(), len(mask)
        for key, array in arrays.items():
            setattr(params, key, _array(array))
        size = ctypes.c_int64()
        workspace_of = self.core.library.spattn_blocks_softmax_cuda_workspace
        check(workspace_of(ctypes.byref(params), ctypes.byref(size)))
        workspace = torch.full((size.value,), 255, dtype=torch.uint8, device="cuda")
        self._call(name, params, ctypes.c_void_p(workspace.data_ptr()))

    def softmax(self, x, scale, dtype, mask=None, out=None):
        out = _new(out, x.shape, dtype)
        self._softmax("softmax", len(x), scale, mask, x=x, y=out)
        return out

    def softmax_grad(self, dy, y, scale, out=None):
        out = _new(out, y.shape, y.dtype)
        self._softmax("softmax_grad", len(y), scale, None, y=y, dy=dy, dx=out)
        return out

    def autoregressive_mask(self, key, out=None):
        out = torch.zeros_like(self.mask) if out is None else out
        params = blocks_abi.Mask(
            *(self._blocks(1), self._lut("nt"), key),
            *(self.mask.data_ptr(), out.data_ptr()),
        )
        self._call("autoregressive_mask", params)
        return out


def _array(x):
    return blocks_abi.array_of(x.data_ptr(), _dtype(x))


def _new(out, shape, dtype):
    if out is not None:
        return out
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")
