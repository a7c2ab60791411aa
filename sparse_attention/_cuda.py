"""CUDA on this machine: its GPUs, NVRTC, and the kernels that NVRTC compiles for them.

The kernels in csrc/cuda/device are compiled for exactly the GPU and the shapes at hand, when the
core first needs one: it asks here (`SpattnCudaCode` in csrc/abi/core.h). A cubin lies in the
cache beside the libraries, under the rules of `_build.py`: one process compiles it while
others wait, and a damaged one is not used. Where there is no NVRTC, or with
SPARSE_ATTENTION_NO_JIT, those that `python -m sparse_attention.build` made are used,
whichever NVRTC made them.
"""

import contextlib
import ctypes
import functools
import glob
import itertools
import os
import sys

import sparse_attention

from . import _build

SOURCES = "cuda/device"  # in csrc
DTYPES = ("float32", "float16", "bfloat16")  # in the order of SpattnDtype
PHASES = ("fwd", "bwd_delta", "bwd_dq", "bwd_dkv")  # in the order of SpattnPhase
BLOCKS_OPS = (  # in the order of SpattnBlocksOp
    "nt",
    "nn",
    "tn",
    "listed",
    "softmax",
    "masked_softmax",
    "softmax_grad",
    "mask",
)
UNSUPPORTED = 2  # of SpattnCode

# kv tiles of 64 pay where they list at most so many times the blocks of those of 128: 1.5
# for `local` and `strided` (dkv: 0.54 for 0.61 ms, 0.49 for 0.53), 1.9 for `fixed` and
# 2 for `all`, where they cost (3.7 for 3.4 ms). Not with head_dim 128 (0.81 for 0.53).
HALF_TILE = 1.6

# NVRTC has no C library headers; core.h wants this one.
STDINT = b"""#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
"""


# ---- the C ABI ----


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 252)]


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            *("arch", "dtype", "head_dim", "head_dim_v"),
            *("is_row_strided", "is_scale_positive", "block_size"),
            *("block_q", "tile_kv"),
        )
    ]


class BlocksShape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("arch", "block_size", "dtype", "scores_dtype", "weights_dtype")
    ] + [("head_dim", ctypes.c_int64)]


class Kernel(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 32), ("macros", ctypes.c_char * 512)] + [
        (name, ctypes.c_int32) for name in ("shared_memory", "threads", "splits")
    ]


CODE = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(Kernel),
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(Status),
)
_callbacks = []  # a library may call them as long as the process lives


def attach(library, ptx_arch=0):
    """Has a library get its kernels here.

    Args:
      library: `ctypes.CDLL` of a library with the core in it.
      ptx_arch: Compile to PTX of this compute capability (70 for 7.0), for the driver to
        compile further; 0: to code for each device.
    """
    given = []  # keeps the last code

    def give(kernel, arch, code, status):
        kernel = kernel.contents
        target = f"compute_{arch}" if ptx_arch else name_of(arch)
        try:
            path = compiled(kernel.name.decode(), kernel.macros.decode(), target)
            with open(path, "rb") as file:
                given[:] = [ctypes.create_string_buffer(file.read())]
            code[0] = ctypes.addressof(given[0])
        except Exception as error:  # it would not pass through C++
            status.contents.code = UNSUPPORTED
            status.contents.message = str(error).encode("ascii", "replace")[:251]

    _callbacks.append(CODE(give))
    library.spattn_cuda_set_code(_callbacks[-1], ptx_arch)


def name_of(arch):
    """NVRTC's name of a compute capability: "sm_90a" of 90."""
    return f"sm_{arch}a" if 90 <= arch < 120 else f"sm_{arch}"


def shape_of(library, arch, dtype, head_dims, block_mask):
    """The `Shape` of a BlockMask, with the largest tiles that fit the device.

    Args:
      library: `ctypes.CDLL` of a library with the core in it.
      arch: Compute capability as 90 of 9.0.
      dtype: One of DTYPES.
      head_dims: head_dim and head_dim_v.
      block_mask: `BlockMask`.
    """
    shape = Shape(arch, DTYPES.index(dtype), *head_dims)
    shape.is_row_strided, shape.is_scale_positive = block_mask.row_stride > 1, True
    shape.block_size = block_mask.block_size
    library.spattn_cuda_tiles(ctypes.byref(shape))
    return shape


def kernel_of(library, shape, phase):
    """The `Kernel` of a `Shape`; `phase` is one of PHASES."""
    kernel = Kernel()
    number = PHASES.index(phase)
    library.spattn_cuda_kernel(ctypes.byref(shape), number, ctypes.byref(kernel))
    return kernel


def blocks_kernel_of(library, op, arch, block_size, dtype, scores, weights, head_dim):
    """The `Kernel` of one of BLOCKS_OPS; `dtype`, `scores`, `weights` are of DTYPES."""
    dtypes = map(DTYPES.index, (dtype, scores, weights))
    shape, kernel = BlocksShape(arch, block_size, *dtypes, head_dim), Kernel()
    number = BLOCKS_OPS.index(op)
    library.spattn_cuda_blocks_kernel(ctypes.byref(shape), number, ctypes.byref(kernel))
    return kernel


def blocks_kernels(library, arch, block_size, dtype, head_dim):
    """{what it does: `Kernel`} of all that `BlocksparseTransformer` runs on a dtype.

    Its scores are bfloat16, and so are its weights, save for float16 queries.
    """
    scores, weights = "bfloat16", "float16" if dtype == "float16" else "bfloat16"
    uses = {}
    for op in BLOCKS_OPS:
        for operand in {scores, weights} if op in ("nt", "nn", "tn") else [scores]:
            uses[f"{op} {operand}"] = blocks_kernel_of(
                library, op, arch, block_size, dtype, operand, weights, head_dim
            )
    return uses


def tiles_kv(shape):
    """[int]: the sizes of kv tile to choose from, the largest first."""
    may_halve = shape.tile_kv == 128 > shape.block_size
    may_halve = may_halve and max(shape.head_dim, shape.head_dim_v) <= 64
    return [128, 64] if may_halve else [shape.tile_kv]


def plans(library, archs, dtype, head_dims, block_mask, group):
    """The `Tiles` and `KvTiles` of a BlockMask that GPUs of all of `archs` run best."""
    shapes = [shape_of(library, arch, dtype, head_dims, block_mask) for arch in archs]
    smallest = min(shapes, key=lambda shape: shape.tile_kv)
    kv_tiles, *halves = (
        block_mask.kv_tiles(tile_kv, group) for tile_kv in tiles_kv(smallest)
    )
    for half in halves:
        if len(half.q_indices) < HALF_TILE * len(kv_tiles.q_indices):
            kv_tiles = half
    return block_mask.tiles(min(shape.block_q for shape in shapes)), kv_tiles


# ---- devices ----


@functools.lru_cache(maxsize=None)
def driver_version():
    """The CUDA version of NVIDIA's driver, as 12040 of 12.4; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.lru_cache(maxsize=None)
def devices():
    """((name, compute capability as 90 of 9.0), ...) of the GPUs that the driver shows."""
    count, found = ctypes.c_int(0), []
    if driver_version() == 0:
        return ()
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))  # leaves 0 where it fails
    for i in range(count.value):
        device, major, minor = (ctypes.c_int() for _ in range(3))
        name = ctypes.create_string_buffer(100)
        driver.cuDeviceGet(ctypes.byref(device), i)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append((name.value.decode(), major.value * 10 + minor.value))
    return tuple(found)


# ---- compiled kernels ----


def compiled(kernel, macros, arch):
    """The path of a kernel's cubin or PTX, compiled now if there is none.

    Args:
      kernel: Name of the kernel and of its file in csrc/cuda/device.
      macros: "-DSPATTN_DTYPE=1 ...", all that it wants.
      arch: "sm_90a": a cubin; "compute_70": PTX.

    Raises:
      RuntimeError: If it is not there and cannot be compiled: why.
    """
    compiler, why = _compiler(arch)
    flags, files = options(macros, arch), sources(kernel)
    parts = [sparse_attention.__version__, *flags, *files]
    key = _build.hash_of(parts + [text.decode() for text in files.values()])[:16]
    place = f"{key}-nvrtc{compiler.version if compiler else '*'}"
    for folder in _build.cache_folders():
        for path in glob.glob(
            os.path.join(glob.escape(folder), place, kernel + ".bin")
        ):
            if _build.is_intact(path):
                _build.say(f"{kernel} for {arch}: cached, {path}")
                return path
    if compiler is None:
        raise RuntimeError(
            f"{kernel} is not compiled for {arch} and cannot be: {why}; where it can, "
            f"`python -m sparse_attention.build --arch {arch}` compiles ahead"
        )

    def make(work, built):
        _build.say(f"{compiler.path} {kernel}.cu {' '.join(flags)}")
        with _build.progress(f"{kernel} for {arch} with NVRTC {compiler.version}"):
            code, _ = compiler.compile(files, kernel, flags)
        with open(built, "wb") as file:
            file.write(code)

    path = os.path.join(_build.cache_folders()[-1], place, kernel + ".bin")
    return _build.make_once(path, make)


def options(macros, arch):
    """[str]: NVRTC's options."""
    return [
        *macros.split(),
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--device-as-default-execution-space",
        "--diag-suppress=1097",  # an unknown attribute: core.h's visibility
    ]


def sources(kernel):
    """{name: text} of what a kernel is compiled from."""
    pattern = os.path.join(glob.escape(_build.CSRC), SOURCES, "*.cuh")
    names = [os.path.join(SOURCES, os.path.basename(p)) for p in glob.glob(pattern)]
    names += [f"{SOURCES}/params.h", f"{SOURCES}/blocks_params.h"]
    names += ["abi/core.h", "abi/blocksparse.h"]
    places = {name: name for name in names}  # as `#include` says them
    places[f"{kernel}.cu"] = f"{SOURCES}/{kernel}.cu"
    files = {"stdint.h": STDINT}
    for name, place in sorted(places.items()):
        with open(os.path.join(_build.CSRC, place), "rb") as file:
            files[name] = file.read()
    return files


def _compiler(arch):
    """(`Nvrtc` or None, why there is none)."""
    if _build.is_set("SPARSE_ATTENTION_NO_JIT"):
        return None, "SPARSE_ATTENTION_NO_JIT is set"
    try:
        return find_nvrtc(arch), None
    except RuntimeError as error:
        return None, str(error)


# ---- NVRTC ----


NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
# Of the pip packages, beside this one; and the toolkit's.
FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "/usr/local/cuda/lib64")


@functools.lru_cache(maxsize=None)
def find_nvrtc(arch):
    """The first `Nvrtc` that compiles for `arch`, and code that this driver loads.

    Raises:
      RuntimeError: If there is none: which were found, and why they do not do.
    """
    driver, unfit = driver_version(), []
    for path in nvrtc_paths():
        try:
            nvrtc = Nvrtc(path)
        except (OSError, AttributeError) as error:  # not whole, or older than CUDA 11.2
            unfit.append(f"NVRTC does not load: {error}")
            continue
        if 0 < driver // 1000 < int(nvrtc.version.split(".")[0]):
            unfit.append(
                f"NVRTC {nvrtc.version} is too new for the driver, which has CUDA "
                f"{driver // 1000}.{driver % 1000 // 10}"
            )
        elif int("".join(filter(str.isdigit, arch))) not in nvrtc.archs:
            unfit.append(f"NVRTC {nvrtc.version} does not know {arch}")
        else:
            return nvrtc
    why = "; ".join(dict.fromkeys(unfit)) or "no NVRTC is installed"
    raise RuntimeError(f"{why} (`pip install nvidia-cuda-nvrtc-cu12` brings 12.9)")


def nvrtc_paths():
    """Where NVRTC is: in this process, wherever the loader looks, in FOLDERS."""
    for mode, name in itertools.product((os.RTLD_NOLOAD, os.RTLD_NOW), NAMES):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=mode)
            yield name
    for root in sys.path:
        for folder in FOLDERS:
            pattern = os.path.join(glob.escape(root), folder, "libnvrtc.so.*")
            yield from sorted(glob.glob(pattern))


class Nvrtc:
    """An NVRTC library.

    Attributes:
      path: What it was opened by.
      version: "12.9".
      archs: Compute capabilities that it compiles for, as 90 of 9.0.
    """

    def __init__(self, path):
        self.path = path
        if os.path.isabs(path):
            # NVRTC opens these by name; that of pip's 13.0 does not look beside itself.
            folder = glob.escape(os.path.dirname(path))
            for builtins in glob.glob(os.path.join(folder, "libnvrtc-builtins.so.*")):
                ctypes.CDLL(builtins)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = (ctypes.c_int() for _ in range(3))
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", archs)
        self.archs = list(archs)

    def compile(self, files, kernel, options):
        """Compiles `kernel`.cu of `files`, {name: text}.

        Returns:
          bytes: a cubin, or PTX for an option --gpu-architecture=compute_XY; what the
          compiler said.

        Raises:
          RuntimeError: If it does not compile: what the compiler said.
        """
        headers = {n: text for n, text in files.items() if not n.endswith(".cu")}
        source = files[f"{kernel}.cu"]
        names, texts, flags = (
            (ctypes.c_char_p * len(strings))(*strings)
            for strings in (
                [name.encode() for name in headers],
                headers.values(),
                [option.encode() for option in options],
            )
        )
        program = ctypes.c_void_p()
        self._call(
            "CreateProgram",
            *(ctypes.byref(program), source, f"{kernel}.cu".encode()),
            *(len(headers), texts, names),
        )
        code = self._library.nvrtcCompileProgram(program, len(flags), flags)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            sys.stderr.write(log)
            first = next((line for line in log.split("\n") if "error" in line), log)
            raise RuntimeError(f"{kernel}.cu does not compile: {first}")
        is_ptx = any("=compute_" in option for option in options)
        output = self._text(program, "PTX" if is_ptx else "CUBIN")
        self._call("DestroyProgram", ctypes.byref(program))
        return output, log

    def _text(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, text)
        return text.raw

    def _call(self, name, *arguments):
        code = getattr(self._library, "nvrtc" + name)(*arguments)
        if code:
            text = self._library.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f"nvrtc{name} of {self.path}: {text}")
