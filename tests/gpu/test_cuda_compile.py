"""Every kernel compiles for every architecture, to the registers in registers.json.

Needs NVRTC 12.9 (`nvidia-cuda-nvrtc-cu12`), no GPU. To write the table anew:

    python tests/gpu/test_cuda_compile.py
"""

import json
import pathlib
import re
import sys

import pytest
from configs import ShapeClass
from nvrtc import Nvrtc

TABLE = pathlib.Path(__file__).with_name("registers.json")
SHAPES = {  # what ships, by the first architecture that has it
    ("float32", 64): 70,
    ("float16", 64): 70,
    ("float16", 128): 80,
    ("bfloat16", 64): 80,
}
ARCHS = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


def kernels(arch):
    """(name in the table, kernel, macros) of what is compiled for an architecture."""
    number = int("".join(filter(str.isdigit, arch)))
    for (dtype, dim), first in SHAPES.items():
        if number < first:
            continue
        shape = ShapeClass(number, dtype, dim, dim, 32)
        for kernel, (macros, _) in shape.kernels().items():
            name = f"{kernel} {arch} {dtype} {dim}"
            yield name, kernel, {"SPATTN_" + k: v for k, v in macros.items()}


def report(nvrtc, kernel, arch, macros):
    """Registers and spilled bytes."""
    _, log = nvrtc.compile(kernel, arch, macros)
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    spilled = int(re.search(r"(\d+) bytes spill stores", log).group(1))
    return {"registers": registers, "spilled": spilled}


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_as_recorded(arch, tmp_path):
    table = json.loads(TABLE.read_text())
    nvrtc = Nvrtc(tmp_path)
    for name, kernel, macros in kernels(arch):
        assert report(nvrtc, kernel, arch, macros) == table[name], name


if __name__ == "__main__":
    compiler = Nvrtc(sys.argv[1] if len(sys.argv) > 1 else ".gpu_cache")
    found = {
        name: report(compiler, kernel, arch, macros)
        for arch in ARCHS
        for name, kernel, macros in kernels(arch)
    }
    TABLE.write_text(json.dumps(found, indent=1) + "\n")
