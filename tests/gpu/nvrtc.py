"""NVRTC through ctypes: kernel sources to cubin or PTX, with or without a GPU."""

import ctypes
import glob
import hashlib
import os
import pathlib
import site
import sys

SOURCES = pathlib.Path(__file__).resolve().parents[2] / "sparse_attention" / "csrc"
# NVRTC has no C library headers; core.h wants this one.
STDINT = b"""#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
"""


def find_library():
    """The path of libnvrtc: of a pip package, else whatever the loader finds."""
    roots = site.getsitepackages() + sys.path
    for root in roots:
        for pattern in ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib"):
            found = sorted(glob.glob(os.path.join(root, pattern, "libnvrtc.so.*")))
            if found:
                return found[0]
    for name in ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            ctypes.CDLL(name)
            return name
        except OSError:
            continue
    raise OSError("no libnvrtc: pip install nvidia-cuda-nvrtc-cu12")


class Nvrtc:
    """One NVRTC library.

    Args:
      cache: Directory of compiled kernels, keyed by sources, macros and architecture.
    """

    def __init__(self, cache):
        self.cache = pathlib.Path(cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        self._library = None
        files = sorted((SOURCES / "cuda").glob("*.*")) + [SOURCES / "core.h"]
        self.files = {path.name: path.read_bytes() for path in files}

    @property
    def library(self):
        if self._library is None:
            self._library = ctypes.CDLL(find_library())
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return self._library

    def _check(self, code, what):
        if code:
            text = self.library.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f"{what}: {text}")

    def compile(self, name, arch, macros):
        """Compiles `name`.cu for `arch` ("sm_90a": cubin; "compute_70": PTX).

        Returns:
          (code bytes, ptxas report).
        """
        options = [f"-D{key}={value}" for key, value in sorted(macros.items())]
        options += [f"--gpu-architecture={arch}", "--std=c++17"]
        options += ["--device-as-default-execution-space", "--diag-suppress=1097"]
        if arch.startswith("sm_"):
            options.append("--ptxas-options=-v")
        key = hashlib.sha256(repr((name, options, self.files)).encode()).hexdigest()[
            :24
        ]
        target = self.cache / f"{key}.bin"
        report = self.cache / f"{key}.txt"
        if not target.exists():
            code, log = self._compile(name, options, arch.startswith("sm_"))
            report.write_text(log)
            target.write_bytes(code)
        return target.read_bytes(), report.read_text()

    def _compile(self, name, options, is_cubin):
        headers = dict(self.files, **{"stdint.h": STDINT})
        source = headers.pop(f"{name}.cu")
        names = (ctypes.c_char_p * len(headers))(*[key.encode() for key in headers])
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        program = ctypes.c_void_p()
        self._check(
            self.library.nvrtcCreateProgram(
                ctypes.byref(program), source, name.encode(), len(headers), texts, names
            ),
            "nvrtcCreateProgram",
        )
        flags = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        code = self.library.nvrtcCompileProgram(program, len(options), flags)
        log = self._text(program, "ProgramLog").decode(errors="replace")
        if code:
            raise RuntimeError(f"{name} {options}:\n{log}")
        output = self._text(program, "CUBIN" if is_cubin else "PTX")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return output, log

    def _text(self, program, what):
        size = ctypes.c_size_t()
        get_size = getattr(self.library, f"nvrtcGet{what}Size")
        self._check(get_size(program, ctypes.byref(size)), what)
        text = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, text), what)
        return text.raw
