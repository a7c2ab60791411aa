"""The structs of csrc/abi and what Python takes them for: the same sizes and offsets."""

import ctypes
import os
import subprocess

import blocks_abi
import core_abi
import pytest
import test_cuda_host

from sparse_attention.native import abi, libraries

STRUCTS = {
    "SpattnStatus": abi.Status,
    "SpattnProblem": core_abi.Problem,
    "SpattnScoreRule": core_abi.ScoreRule,
    "SpattnTensor": core_abi.Tensor,
    "SpattnPlan": core_abi.Plan,
    "SpattnKvPlan": core_abi.KvPlan,
    "SpattnThreads": core_abi.Threads,
    "SpattnFwdParams": core_abi.FwdParams,
    "SpattnBwdParams": core_abi.BwdParams,
    "SpattnCudaShape": abi.Shape,
    "SpattnCudaKernel": abi.Kernel,
    "SpattnTilePlan": test_cuda_host.TilePlan,
    "SpattnCudaFwdParams": test_cuda_host.CudaFwdParams,
    "SpattnCudaMappedFwdParams": test_cuda_host.CudaMappedFwdParams,
    "SpattnCudaBwdParams": test_cuda_host.CudaBwdParams,
    "SpattnCudaDqSums": test_cuda_host.CudaDqSums,
    "SpattnCudaMappedBwdParams": test_cuda_host.CudaMappedBwdParams,
    "SpattnBlocks": blocks_abi.Blocks,
    "SpattnLut": blocks_abi.Lut,
    "SpattnArray": blocks_abi.Array,
    "SpattnBlocksMatmul": blocks_abi.Matmul,
    "SpattnBlocksSoftmax": blocks_abi.Softmax,
    "SpattnBlocksMask": blocks_abi.Mask,
    "SpattnCudaBlocksShape": abi.BlocksShape,
}
# These are not mirrored: the first is the driver's, the others are made and read in C++ alone.
OPAQUE = {
    *("SpattnTensorMap", "SpattnCudaSoftmaxParams", "SpattnCudaRule"),
    *(
        f"SpattnCudaRule{kernel}Params"
        for kernel in ("Words", "Ranges", "Pairs", "Lists", "Bias")
    ),
}
# Bytes; that of a CUtensorMap.
ALIGNMENTS = {"SpattnCudaMappedFwdParams": 64, "SpattnCudaMappedBwdParams": 64}
HEADERS = [
    *("abi/core.h", "abi/blocksparse.h"),
    *("cuda/device/params.h", "cuda/device/blocks_params.h"),
]


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory):
    """{struct: {field: (offset, size)}}, "" being the struct itself, as g++ has them."""
    folder = tmp_path_factory.mktemp("abi")
    lines = [f'#include "{header}"' for header in HEADERS]
    lines += ["#include <stddef.h>", "#include <stdio.h>", "int main() {"]
    for struct, mirror in STRUCTS.items():
        lines.append(f'printf("{struct} . 0 %zu\\n", sizeof({struct}));')
        for field, *_ in mirror._fields_:
            where = f"offsetof({struct}, {field}), sizeof((({struct}*)0)->{field})"
            lines.append(f'printf("{struct} {field} %zu %zu\\n", {where});')
    source, program = str(folder / "offsets.cc"), str(folder / "offsets")
    with open(source, "w") as file:
        file.write("\n".join([*lines, "}"]))
    flags = ["-std=c++17", "-I" + libraries.CSRC]
    subprocess.check_call(["g++", *flags, source, "-o", program])
    found = {struct: {} for struct in STRUCTS}
    for line in subprocess.check_output([program]).decode().splitlines():
        struct, field, offset, size = line.split()
        found[struct][field.strip(".")] = int(offset), int(size)
    return found


@pytest.mark.parametrize("struct", STRUCTS)
def test_struct_is_the_same_in_python(struct, in_cpp):
    mirror = STRUCTS[struct]
    alignment = ALIGNMENTS.get(struct, 1)  # ctypes cannot say it
    size = -(-ctypes.sizeof(mirror) // alignment) * alignment
    expected = {"": (0, size)}
    for field, *_ in mirror._fields_:
        descriptor = getattr(mirror, field)
        expected[field] = descriptor.offset, descriptor.size
    assert in_cpp[struct] == expected


def test_every_struct_of_the_headers_is_compared():
    named = set()
    for header in HEADERS:
        with open(os.path.join(libraries.CSRC, header)) as file:
            ends = [line for line in file if line.startswith("} Spattn")]
        named.update(line[2:].split(";")[0] for line in ends)
    kinds = "Code", "Dtype", "Phase", "BlocksOp", "RuleParts"
    enums = {name for name in named if name.endswith(kinds)}
    assert named - enums - OPAQUE == set(STRUCTS)
