"""The driver and the GPUs of this machine, as NVIDIA's driver tells."""

import contextlib
import ctypes
import functools


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


def name_of(arch):
    """NVRTC's name of a compute capability: "sm_90a" of 90."""
    return f"sm_{arch}a" if 90 <= arch < 120 else f"sm_{arch}"
