"""Compiled CUDA kernels: shipped in the package, from the cache, or made by NVRTC.

The kernels in csrc/cuda/device are compiled for exactly the GPU and the shapes at hand, when the
core first needs one: it asks here (`SpattnCudaCode` in csrc/abi/core.h). A wheel may have
brought it (`prebuilt/kernels/`), and then NVRTC is not looked for. Otherwise a cubin lies in the
cache beside the libraries, under the rules of `native/cache.py`: one process compiles it while
others wait, and a damaged one is not used. Where there is no NVRTC, or with
SPARSE_ATTENTION_NO_JIT, those that `python -m sparse_attention.build` made are used,
whichever NVRTC made them.
"""

import ctypes
import glob
import os
import shutil

import sparse_attention

from .. import cache
from ..abi import UNSUPPORTED, Kernel, Status
from ..libraries import CSRC, PACKAGE
from .devices import name_of
from .nvrtc import find_nvrtc

SOURCES = "cuda/device"  # in csrc
SHIPPED = os.path.join(
    PACKAGE, "prebuilt", "kernels"
)  # of a wheel, laid out as the cache

# NVRTC has no headers of the C library, and core.h includes this one.
STDINT = b"""#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
"""


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


def compiled(kernel, macros, arch):
    """The path of a kernel's cubin or PTX, compiled now if there is none.

    Args:
      kernel: Name of the kernel and of its file in csrc/cuda/device.
      macros: "-DSPATTN_DTYPE=1 ...", all that it wants.
      arch: "sm_90a": a cubin; "compute_70": PTX.

    Raises:
      RuntimeError: If it is not there and cannot be compiled; it says why.
    """
    flags, files = options(macros, arch), sources(kernel)
    parts = [sparse_attention.__version__, *flags, *files]
    key = cache.hash_of(parts + [text.decode() for text in files.values()])[:16]
    path = _find([SHIPPED], f"{key}-nvrtc*", kernel)
    if path is not None:
        cache.say(f"{kernel} for {arch}: shipped in the package, {path}")
        return path
    nvrtc, why = _nvrtc(arch)
    place = f"{key}-nvrtc{nvrtc.version if nvrtc else '*'}"
    path = _find(cache.cache_folders(), place, kernel)
    if path is not None:
        cache.say(f"{kernel} for {arch}: cached, {path}")
        return path
    if nvrtc is None:
        raise RuntimeError(
            f"{kernel} is not compiled for {arch} and cannot be: {why}; where it can, "
            f"`python -m sparse_attention.build --arch {arch}` compiles ahead"
        )

    def make(work, built):
        cache.say(f"{nvrtc.path} {kernel}.cu {' '.join(flags)}")
        with cache.progress(f"{kernel} for {arch} with NVRTC {nvrtc.version}"):
            code, _ = nvrtc.compile(files, kernel, flags)
        with open(built, "wb") as file:
            file.write(code)

    path = os.path.join(cache.cache_folders()[-1], place, kernel + ".bin")
    return cache.make_once(path, make)


def _find(folders, place, kernel):
    """The path of a kernel that is whole, in the first of the folders; or None."""
    for folder in folders:
        pattern = os.path.join(glob.escape(folder), place, kernel + ".bin")
        for path in sorted(glob.glob(pattern)):
            if cache.is_intact(path):
                return path
    return None


def copy(path, folder):
    """Copies a kernel and its record into a folder that a wheel ships as SHIPPED."""
    place = os.path.join(folder, os.path.basename(os.path.dirname(path)))
    os.makedirs(place, exist_ok=True)
    for name in (path, path + ".json"):
        shutil.copy(name, place)


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
    pattern = os.path.join(glob.escape(CSRC), SOURCES, "*.cuh")
    names = [os.path.join(SOURCES, os.path.basename(p)) for p in glob.glob(pattern)]
    names += [f"{SOURCES}/params.h", f"{SOURCES}/blocks_params.h"]
    names += ["abi/core.h", "abi/score_rule.h", "abi/blocksparse.h"]
    places = {name: name for name in names}  # as `#include` says them
    places[f"{kernel}.cu"] = f"{SOURCES}/{kernel}.cu"
    files = {"stdint.h": STDINT}
    for name, place in sorted(places.items()):
        with open(os.path.join(CSRC, place), "rb") as file:
            files[name] = file.read()
    return files


def _nvrtc(arch):
    """The `Nvrtc` to compile with, or None; and a str, why there is none, or None."""
    if cache.is_set("SPARSE_ATTENTION_NO_JIT"):
        return None, "SPARSE_ATTENTION_NO_JIT is set"
    try:
        return find_nvrtc(arch), None
    except RuntimeError as error:
        return None, str(error)
