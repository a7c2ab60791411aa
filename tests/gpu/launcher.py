"""Runs the core's CUDA functions on PyTorch tensors: no TensorFlow, no CUDA toolkit."""

import ctypes
import shutil
import tempfile

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
)

from sparse_attention import _build, _cuda


def load_core(ptx_arch=0):
    """A `Core` of its own that gets its kernels from `_cuda`; see `_cuda.attach`."""
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        shutil.copy(_build.build_core(), copy.name)
        core = Core(copy.name)
    _cuda.attach(core.library, ptx_arch)
    torch.zeros(1, device="cuda")  # makes the context current
    return core


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _tensor(x):
    """[batch, rows, heads, dim] of any strides, dim contiguous; None: no data."""
    return Tensor() if x is None else Tensor(x.data_ptr(), *x.stride()[:3])


class Attention:
    """One BlockMask's plans on the device.

    Args:
      core: What `load_core` returns.
      block_mask: `BlockMask`.
      tiles, kv_tiles: Its plans, as `_cuda.plans` chooses them.
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
    ):
        self.core, self.block_mask = core, block_mask
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

    def _problem(self, q, k, v, kv_lengths):
        scale, head_dim = self.softmax_scale, q.shape[3]
        return Problem(
            *(q.shape[0], q.shape[1], k.shape[1], self.heads, self.kv_heads),
            *(head_dim, v.shape[3], _cuda.DTYPES.index(str(q.dtype).split(".")[1])),
            *(head_dim**-0.5 if scale is None else scale, self.block_mask.row_stride),
            _pointer(kv_lengths),
        )

    def _call(self, name, structs, *workspace):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = getattr(self.core.library, "spattn_" + name)
        check(function(*map(ctypes.byref, structs), stream, *workspace))

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
            out[1].data_ptr(),
        )
        self._call("fwd_cuda", [params])
        return out

    def backward(self, q, k, v, o, lse, do, dlse=None, kv_lengths=None, out=None):
        """dq, dk, dv; those that are None in `out` are left out."""
        if out is None:
            out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        params = BwdParams(
            *(self._problem(q, k, v, kv_lengths), self.plan),
            *map(_tensor, (q, k, v, o, do)),
            *map(_pointer, (lse, dlse)),
            *map(_tensor, out),
        )
        size = ctypes.c_int64()
        workspace_of = self.core.library.spattn_bwd_cuda_workspace
        check(workspace_of(ctypes.byref(params), ctypes.byref(size)))
        # All ones: NaN where read too soon.
        workspace = torch.full((size.value,), 255, dtype=torch.uint8, device="cuda")
        pointer = ctypes.c_void_p(workspace.data_ptr())
        self._call("bwd_cuda", [params, self.kv_plan], pointer)
        return out
