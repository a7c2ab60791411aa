"""The GPUs of this machine: those NVIDIA's driver shows, those TensorFlow sees."""

import contextlib
import ctypes
import functools


@functools.lru_cache(maxsize=None)
def driver_version():
    """The CUDA version of NVIDIA's driver, 12040 for 12.4; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


@functools.lru_cache(maxsize=None)
def devices():
    """((name, compute capability), ...) of the driver's GPUs; 90 stands for 9.0."""
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


def visible_archs():
    """{int}: compute capabilities of the GPUs that TensorFlow sees; 90 stands for 9.0.

    TensorFlow is asked first, and the driver not at all unless TensorFlow has a GPU. It
    is asked for physical devices: its own settings can still be changed afterwards.
    """
    import tensorflow as tf

    gpus = tf.config.experimental.get_visible_devices("GPU")
    details_of = getattr(tf.config.experimental, "get_device_details", None)
    archs = set()
    for gpu in gpus:
        if details_of is not None:
            found = details_of(gpu).get("compute_capability")  # unknown of other makes
            archs |= {found[0] * 10 + found[1]} if found else set()
        else:  # TensorFlow before 2.3 numbers its GPUs as the driver does
            index = int(gpu.name.rpartition(":")[2])
            archs |= {arch for _, arch in devices()[index : index + 1]}
    return archs


def name_of(arch):
    """NVRTC's name for a compute capability: "sm_90a" for 90."""
    return f"sm_{arch}a" if 90 <= arch < 120 else f"sm_{arch}"
