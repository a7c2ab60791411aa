"""NVRTC, the compiler of CUDA kernels, wherever this machine has it."""

import contextlib
import ctypes
import functools
import glob
import itertools
import os
import sys

from .devices import driver_version

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
# Where the pip packages beside this one keep it, and where CUDA's toolkit does.
FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "/usr/local/cuda/lib64")


@functools.lru_cache(maxsize=None)
def find_nvrtc(arch):
    """The first `Nvrtc` that compiles for `arch` and makes code that the driver loads.

    Raises:
      RuntimeError: If there is none; it says which were found, and why none will do.
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
    """Yields where NVRTC may be: in this process, where the loader looks, in FOLDERS."""
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
      archs: Compute capabilities that it compiles for; 90 stands for 9.0.
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
          bytes, a cubin, or PTX for an option --gpu-architecture=compute_XY; and a str,
          what the compiler said.

        Raises:
          RuntimeError: If it does not compile; the compiler's words go to stderr.
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
