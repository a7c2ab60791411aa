"""Runs the CUDA kernels on PyTorch tensors: no TensorFlow, no CUDA toolkit."""

import ctypes

import numpy as np
import plans
import torch
from configs import DTYPES, shape_class
from nvrtc import Nvrtc

# ---- the structs of core.h and params.h ----


def _struct(name, fields):
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Problem = _struct(
    "Problem",
    [(n, ctypes.c_int64) for n in ("batch", "q_len", "kv_len")]
    + [
        (n, ctypes.c_int32)
        for n in ("heads", "kv_heads", "head_dim", "head_dim_v", "dtype")
    ]
    + [
        ("softmax_scale", ctypes.c_float),
        ("row_stride", ctypes.c_int64),
        ("kv_lengths", ctypes.c_void_p),
    ],
)
Tensor = _struct(
    "Tensor",
    [("data", ctypes.c_void_p)]
    + [(n, ctypes.c_int64) for n in ("batch_stride", "row_stride", "head_stride")],
)
TilePlan = _struct(
    "TilePlan",
    [
        (n, ctypes.c_int32)
        for n in ("heads", "tiles", "blocks", "entries", "mask_blocks")
    ]
    + [
        (n, ctypes.c_void_p)
        for n in ("tile_blocks", "indptr", "indices", "mask_ids", "mask_bits")
    ],
)
FwdParams = _struct(
    "FwdParams",
    [("problem", Problem), ("by_q", TilePlan)]
    + [(n, Tensor) for n in "qkvo"]
    + [("lse", ctypes.c_void_p)],
)
BwdParams = _struct(
    "BwdParams",
    [("problem", Problem), ("by_q", TilePlan), ("by_kv", TilePlan)]
    + [(n, Tensor) for n in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")]
    + [(n, ctypes.c_void_p) for n in ("lse", "dlse", "lse_exp", "delta")],
)


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _tensor(x):
    """[batch, rows, heads, dim] of any strides, dim contiguous."""
    return Tensor(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


# ---- driver ----


class Device:
    """Compiles and launches; "sm_90a": cubins, "compute_70": PTX for the driver."""

    def __init__(self, cache, arch):
        self.nvrtc, self.arch = Nvrtc(cache), arch
        self.number = int("".join(filter(str.isdigit, arch)))
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.functions = {}
        torch.zeros(1, device="cuda")  # makes the context current

    def _check(self, code, what):
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: {text.value}")

    def function(self, kernel, macros, shared_memory):
        key = kernel, tuple(sorted(macros.items()))
        if key not in self.functions:
            names = {"SPATTN_" + name: value for name, value in macros.items()}
            code, _ = self.nvrtc.compile(kernel, self.arch, names)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check(
                self.driver.cuModuleLoadData(ctypes.byref(module), code),
                "cuModuleLoadData",
            )
            self._check(
                self.driver.cuModuleGetFunction(
                    ctypes.byref(function), module, kernel.encode()
                ),
                "cuModuleGetFunction",
            )
            dynamic_shared_size = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(
                self.driver.cuFuncSetAttribute(
                    function, dynamic_shared_size, shared_memory
                ),
                f"{kernel} shared memory {shared_memory}",
            )
            self.functions[key] = function
        return self.functions[key]

    def launch(self, function, grid, threads, shared_memory, params):
        if 0 in grid:
            return
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self.driver.cuLaunchKernel(
                function,
                *grid,
                threads,
                1,
                1,
                shared_memory,
                stream,
                arguments,
                None,
            ),
            "cuLaunchKernel",
        )


# ---- attention ----


class Attention:
    """One BlockMask's plans on the device, and the kernels for one shape class.

    Args:
      device: `Device`.
      block_mask: `BlockMask`.
      block_q, block_kv: Tiles of the plans by queries and by keys; None: the best.
      tuning: {kernel: macros} that replace the configuration's.
    """

    def __init__(
        self,
        device,
        block_mask,
        heads,
        dtype,
        head_dim,
        head_dim_v=None,
        kv_heads=None,
        softmax_scale=None,
        block_q=None,
        block_kv=None,
        tuning=None,
    ):
        self.device, self.block_mask, self.dtype = device, block_mask, dtype
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim, self.head_dim_v = head_dim, head_dim_v or head_dim
        self.scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.shape, by_kv = shape_class(
            block_mask,
            device.number,
            str(dtype).split(".")[1],
            self.head_dim,
            self.head_dim_v,
            self.heads // self.kv_heads,
            self.scale,
            block_q,
            block_kv,
        )
        self.kernels = self.shape.kernels(tuning)
        self.by_q, self.keep_q = self._upload(
            plans.by_q(block_mask, self.shape.block_q)
        )
        self.by_kv, self.keep_kv = self._upload(by_kv)

    def _upload(self, plan):
        arrays = [
            None if array is None else torch.from_numpy(np.array(array)).cuda()
            for array in plan[3:]
        ]
        sizes = (
            plan.heads,
            plan.tiles,
            plan.blocks,
            len(plan.indices),
            len(plan.mask_bits),
        )
        return TilePlan(*sizes, *[_pointer(a) for a in arrays]), arrays

    def _launch(self, name, params):
        macros, shared_memory = self.kernels[name]
        function = self.device.function(name, macros, shared_memory)
        grid, threads = self.shape.grid(
            name, macros, params.problem, self.by_q, self.by_kv
        )
        self.device.launch(function, grid, threads, shared_memory, params)

    def problem(self, q, k, kv_lengths):
        return Problem(
            q.shape[0],
            q.shape[1],
            k.shape[1],
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.head_dim_v,
            DTYPES[self.shape.dtype],
            self.scale,
            self.block_mask.row_stride,
            _pointer(kv_lengths),
        )

    def forward(self, q, k, v, kv_lengths=None, out=None):
        """o [batch, q_len, heads, head_dim_v] and lse float32 [batch, heads, q_len]."""
        if out is None:
            out = (
                q.new_full((*q.shape[:3], self.head_dim_v), float("nan")),
                q.new_full(
                    (q.shape[0], self.heads, q.shape[1]),
                    float("nan"),
                    dtype=torch.float32,
                ),
            )
        o, lse = out
        tensors = [_tensor(x) for x in (q, k, v, o)]
        params = FwdParams(
            self.problem(q, k, kv_lengths), self.by_q, *tensors, lse.data_ptr()
        )
        self._launch("attention_fwd", params)
        return o, lse

    def backward(
        self, q, k, v, o, lse, do, dlse=None, kv_lengths=None, out=None, only=None
    ):
        """dq, dk, dv; `only` names one kernel to run."""
        if out is None:
            stats = [torch.full_like(lse, float("nan")) for _ in range(2)]
            out = [torch.full_like(x, float("nan")) for x in (q, k, v)] + stats
        dq, dk, dv, lse_exp, delta = out
        params = BwdParams(
            self.problem(q, k, kv_lengths),
            self.by_q,
            self.by_kv,
            *[_tensor(x) for x in (q, k, v, o, do, dq, dk, dv)],
            *[_pointer(x) for x in (lse, dlse, lse_exp, delta)],
        )
        for name in ("attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"):
            if only in (None, name):
                self._launch(name, params)
        return dq, dk, dv
