"""A fake NVIDIA driver and a fake NVRTC.

They are compiled here and found as the real ones are. "Device memory" is memory of the
host, launches are written down, and a kernel's code is the options it was compiled with.
What a test does on them is a function of its module, run in a new process.
"""

import ctypes
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from core_abi import InvalidArgument

from sparse_attention.native import libraries

DRIVER = r"""
#include <string.h>
typedef void* H;
typedef struct { char name[32], code[1024]; int shared_memory; } Function;
typedef struct {
  char name[32], code[1024];
  unsigned grid[3], threads, shared_memory;
  H stream, context;
  char params[1200];
} Launch;
int version = 12040, capability = 90, multiprocessors = 132;
int failing_load, failing_launch, failing_map, loads, launches;
int param_bytes, memsets;
unsigned long long zeroed[2];  // by the last memset: an address and bytes
H context = (H)1;
Function functions[64];
Launch launch[64];

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* v) { *v = version; return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* device, int i) { *device = i; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strcpy(name, "Fake GPU"); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 16 ? multiprocessors : attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuCtxGetCurrent(H* c) { *c = context; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuGetErrorString(int code, const char** text) { *text = "the fake fails"; return 0; }
int capture_mode = 1;  // of a thread whose stream is being recorded: loading is an error
int cuThreadExchangeStreamCaptureMode(int* mode) {
  int before = capture_mode;
  capture_mode = *mode, *mode = before;
  return 0;
}
int cuModuleLoadData(H* module, const void* code) {
  if (capture_mode != 2) return 900;
  if (failing_load) return 209;
  strcpy(functions[loads].code, code);
  *module = &functions[loads++];
  return 0;
}
int cuModuleGetFunction(H* function, H module, const char* name) {
  strcpy(((Function*)module)->name, name);
  *function = module;
  return 0;
}
int cuFuncSetAttribute(H function, int attribute, int value) {
  if (attribute == 8) ((Function*)function)->shared_memory = value;
  return 0;
}
int cuMemsetD32Async(unsigned long long address, unsigned value, unsigned long long count,
                     H stream) {
  if (value != 0) return 1;
  zeroed[0] = address, zeroed[1] = count * 4, ++memsets;
  return 0;
}
#ifndef OLD
int cuTensorMapEncodeTiled(unsigned long long* map, int type, unsigned rank, void* address,
                           const unsigned long long* sizes, const unsigned long long* strides,
                           const unsigned* box, const unsigned* element_strides, int interleave,
                           int swizzle, int l2_promotion, int fill) {
  if (failing_map || rank != 4 || interleave || swizzle != 3 || fill) return 1;
  map[0] = type, map[1] = (unsigned long long)address;
  memcpy(map + 2, sizes, 4 * 8);
  memcpy(map + 6, strides, 3 * 8);
  map[9] = box[0], map[10] = box[1], map[11] = box[2] * box[3];
  return 0;
}
int cuLaunchKernel(H function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                   unsigned bz, unsigned shared_memory, H stream, void** params, void** extra) {
  Function* f = function;
  Launch* to = &launch[launches];
  if (failing_launch || f->shared_memory != shared_memory || by * bz != 1) return 700;
  strcpy(to->name, f->name);
  strcpy(to->code, f->code);
  to->grid[0] = x, to->grid[1] = y, to->grid[2] = z;
  to->threads = threads, to->shared_memory = shared_memory;
  to->stream = stream, to->context = context;
  memcpy(to->params, params[0], param_bytes);
  launches++;
  return 0;
}
#endif
"""

NVRTC = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char code[1024], log_[] = "attention_fwd.cu(7): error: the fake fails\n";
int nvrtcVersion(int* major, int* minor) { *major = MAJOR; *minor = 9; return 0; }
int nvrtcGetNumSupportedArchs(int* n) { *n = 2; return 0; }
int nvrtcGetSupportedArchs(int* archs) { archs[0] = 80; archs[1] = 90; return 0; }
const char* nvrtcGetErrorString(int code) { return "an error"; }
int nvrtcCreateProgram(void** program, const char* source, const char* name, int headers,
                       const char** texts, const char** names) {
  *program = code;
  strcpy(code, name);
  return 0;
}
int nvrtcCompileProgram(void* program, int n, const char** options) {
  FILE* runs = fopen(getenv("FAKE_RUNS"), "a");
  fputs("run\n", runs);
  fclose(runs);
  const char* hold = getenv("FAKE_HOLD");  // a file: while it exists nothing compiles on
  usleep(100000);
  while (hold && access(hold, F_OK) == 0) usleep(1000);
  for (int i = 0; i < n; ++i) strcat(strcat(code, " "), options[i]);
  return getenv("FAKE_FAILS") ? 6 : 0;
}
int nvrtcGetProgramLogSize(void* program, size_t* size) { *size = sizeof(log_); return 0; }
int nvrtcGetProgramLog(void* program, char* to) { strcpy(to, log_); return 0; }
int nvrtcGetCUBINSize(void* program, size_t* size) { *size = strlen(code) + 1; return 0; }
int nvrtcGetCUBIN(void* program, char* to) { strcpy(to, code); return 0; }
int nvrtcGetPTXSize(void* program, size_t* size) { *size = strlen(code) + 5; return 0; }
int nvrtcGetPTX(void* program, char* to) { strcat(strcpy(to, "PTX "), code); return 0; }
int nvrtcDestroyProgram(void** program) { return 0; }
"""


@pytest.fixture(scope="session")
def fakes(tmp_path_factory):
    """A folder of folders with a library each: driver, old_driver, nvrtc, new_nvrtc."""
    folder = tmp_path_factory.mktemp("fakes")
    for name, source, library, macro in (
        ("driver", DRIVER, "libcuda.so.1", "NEW"),
        ("old_driver", DRIVER, "libcuda.so.1", "OLD"),
        ("nvrtc", NVRTC, "libnvrtc.so.12", "MAJOR=12"),
        ("new_nvrtc", NVRTC, "libnvrtc.so.13", "MAJOR=13"),
    ):
        (folder / name).mkdir()
        (folder / name / "source.c").write_text(source)
        subprocess.check_call(
            ["gcc", "-shared", "-fPIC", "-w", f"-D{macro}", f"-Wl,-soname,{library}"]
            + [str(folder / name / "source.c"), "-o", str(folder / name / library)]
        )
    return folder


class Machine:
    """Runs a test module's function in a new process, on some of the fakes."""

    def __init__(self, fakes, folder):
        self.fakes, self.folder = fakes, folder
        self.runs_file = folder / "runs"
        self.cache = folder / "cache"
        self.core = libraries.build_core()
        self.said = ""

    def run(self, function, *arguments, libraries=("driver", "nvrtc"), **environment):
        """What `function(core, *arguments)` returns; `said` is what goes to stderr."""
        code = (
            "import importlib, json, sys, core_abi\n"
            "from sparse_attention.native.cuda import nvrtc\n"
            "nvrtc.FOLDERS = ()\n"  # no real NVRTC
            "tests = importlib.import_module(sys.argv[4])\n"
            "core = core_abi.Core(sys.argv[1])\n"
            "result = getattr(tests, sys.argv[2])(core, *json.loads(sys.argv[3]))\n"
            "print(json.dumps(result))"
        )
        here = os.path.dirname(os.path.abspath(__file__))
        ran = subprocess.run(
            [sys.executable, "-c", code, self.core, function.__name__]
            + [json.dumps(arguments), function.__module__],
            capture_output=True,
            text=True,
            env=dict(
                os.environ,
                PYTHONPATH=os.pathsep.join([here, os.path.dirname(here)]),
                LD_LIBRARY_PATH=os.pathsep.join(
                    str(self.fakes / name) for name in libraries
                ),
                SPARSE_ATTENTION_CACHE_DIR=str(self.cache),
                FAKE_RUNS=str(self.runs_file),
                **environment,
            ),
        )
        assert ran.returncode == 0, ran.stderr
        self.said = ran.stderr
        return json.loads(ran.stdout)

    def runs(self):
        """How often the fake NVRTC has compiled."""
        return len(self.runs_file.read_text().split()) if self.runs_file.exists() else 0


@pytest.fixture
def machine(fakes, tmp_path):
    return Machine(fakes, tmp_path)


# ---- in the new process ----


class Launch(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 32),
        ("code", ctypes.c_char * 1024),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_memory", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("params", ctypes.c_char * 1200),
    ]


def aligned(*shape):
    """float16 zeros, at a multiple of 64 bytes."""
    size = int(np.prod(shape))
    memory = np.zeros(size + 64, np.float16)
    start = -memory.ctypes.data % 64 // 2
    return memory[start : start + size].reshape(shape)


def launches_of(driver):
    """[Launch]: what has been launched."""
    launches = (Launch * 64).in_dll(driver, "launch")
    return launches[: ctypes.c_int.in_dll(driver, "launches").value]


def set_int(library, name, value):
    ctypes.c_int.in_dll(library, name).value = value


def error_of(function):
    try:
        function()
    except InvalidArgument as error:
        return str(error)
    return None
