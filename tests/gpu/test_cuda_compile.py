"""Every kernel compiles for every architecture, as registers.json has it.

None spills more than two registers of a thread, save those with a score rule.

Needs NVRTC 12.9 (`nvidia-cuda-nvrtc-cu12`), no GPU. To write the table anew:

    python tests/gpu/test_cuda_compile.py
"""

import ctypes
import json
import pathlib
import re

import pytest

from sparse_attention.native import abi, libraries
from sparse_attention.native.cuda import devices, kernels, nvrtc
from sparse_attention.plan.block_mask import BlockMask

TABLE = pathlib.Path(__file__).with_name("registers.json")
ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
SHAPES = {  # (dtype, head_dim): the architectures it is compiled for here
    ("float32", 64): ARCHS,
    ("float32", 128): (70, 80),  # one stage; takes long to compile
    ("float16", 64): ARCHS,
    ("float16", 128): ARCHS[2:],
    ("bfloat16", 64): ARCHS[2:],
    # Of the kernels for sm_90a: dims that fill no whole panels of 64 columns.
    ("float16", 40): (90,),
    ("bfloat16", 80): (90,),
    ("float16", 96): (90,),
}
RULED = ("float16", 64)  # of these, that with score rules
# Each part alone, and together; relative_bias with its gradient, and without a soft cap.
LONG_RULES = (1, 2, 8, 16, 32, 0b1000100, 0b1101110, 0b101011, 0b110011)
BLOCKS = {  # of the three ops, (dtype, block_size, head_dim)
    ("float16", 64, 64): (70, 80, 89, 90, 100, 120),
    ("float32", 32, 64): (75, 86),
    ("bfloat16", 16, 64): (70, 80),
}


def kernels_of(library, arch):
    """Yields (name in the table, `Kernel`) of an architecture."""
    block_mask, name = BlockMask([[True]], block_size=32), devices.name_of(arch)
    for (dtype, dim), archs in SHAPES.items():
        if arch in archs:
            shape = abi.shape_of(library, arch, dtype, [dim, dim], block_mask)

            def named(phase, more="", shape=shape, sizes=f"{dtype} {dim}"):
                kernel = abi.kernel_of(library, shape, phase)
                return f"{kernel.name.decode()} {name} {sizes}{more}", kernel

            yield from map(named, abi.PHASES)
            for shape.uses_tf32 in [1] if dtype == "float32" and arch >= 80 else ():
                for phase in abi.PHASES:
                    yield named(phase, sizes=f"tf32 {dim}")
            has_long = arch == 90 and dtype != "float32"
            for shape.list_keys in abi.LIST_KEYS[1:] if has_long else ():
                yield named("fwd", f", lists of {shape.list_keys}")
            yield from map(named, abi.LONG_PHASES if has_long else ())
            is_ruled = has_long and dtype == RULED[0]
            for shape.rule in LONG_RULES if is_ruled else ():
                for phase in ("fwd", "bwd"):
                    yield named(phase, f", rule {shape.rule}")
            if is_ruled:
                yield named("bwd_ranks", ", rule")
                # A passing tile has the most blocks where they are of 8.
                size, shape.block_size = shape.block_size, 8
                for shape.rule in (0, LONG_RULES[-2]):
                    for phase in ("fwd", "bwd"):
                        yield named(phase, f", blocks of 8, rule {shape.rule}")
                shape.block_size = size
            shape.rule = 0
            # The parts of a rule together, where it looks at segments and where at a mask.
            shape.list_keys, segments, mask = 0, 0b1101111, 0b0110111
            for shape.rule in [segments, mask] if (dtype, dim) == RULED else ():
                for phase in ("fwd", "bwd_dq", "bwd_dkv"):
                    yield named(phase, f", rule {shape.rule}")
            for phase in abi.RULE_PHASES if (dtype, dim) == RULED else ():
                yield named(phase, sizes="rule")
    for (dtype, block_size, head_dim), archs in BLOCKS.items():
        if arch in archs:
            kernels = abi.blocks_kernels(library, arch, block_size, dtype, head_dim)
            for use, kernel in sorted(kernels.items()):
                yield f"blocks {use} {name} {dtype} {block_size} {head_dim}", kernel


def reports(arch):
    """{name in the table: its registers; spilled and dynamic shared bytes} for `arch`."""
    library, name, found = (
        ctypes.CDLL(libraries.build_core()),
        devices.name_of(arch),
        {},
    )
    tool = nvrtc.find_nvrtc(name)
    for key, kernel in kernels_of(library, arch):
        _, log = tool.compile(
            *(kernels.sources(kernel.name.decode()), kernel.name.decode()),
            [*kernels.options(kernel.macros.decode(), name), "--ptxas-options=-v"],
        )
        # Products that ptxas must wait for one by one; registers that it will not move.
        assert "serialized" not in log and "C75" not in log, log
        registers = int(re.search(r"Used (\d+) registers", log).group(1))
        spilled = int(re.search(r"(\d+) bytes spill stores", log).group(1))
        found[key] = {
            "registers": registers,
            "spilled": spilled,
            "shared_memory": kernel.shared_memory,
        }
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_as_recorded(arch):
    table, name = json.loads(TABLE.read_text()), devices.name_of(arch)
    found = reports(arch)
    assert found == {k: table[k] for k in table if f" {name} " in k}
    spilled = [k for k, report in found.items() if report["spilled"] > 8]
    assert all(", rule " in k for k in spilled), spilled


if __name__ == "__main__":
    found = {}
    for arch in ARCHS:
        found.update(reports(arch))
    TABLE.write_text(json.dumps(found, indent=1) + "\n")
