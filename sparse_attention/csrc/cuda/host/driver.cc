// driver.cc — opens NVIDIA's driver.
#include "cuda/host/driver.h"

#include <dlfcn.h>

namespace spattn {
namespace {

struct Opened {
  Driver driver;
  SpattnStatus status;
};

Opened Open() {
  Opened opened = {{}, Ok()};
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    opened.status = Failed(SPATTN_UNSUPPORTED, "no NVIDIA driver: %s", dlerror());
    return opened;
  }
  const auto find = [&](auto* function, const char* name) {
    *reinterpret_cast<void**>(function) = dlsym(library, name);
    if (*function == nullptr) {
      opened.status =
          Failed(SPATTN_UNSUPPORTED, "the NVIDIA driver is too old: it has no %s", name);
    }
  };
  Driver& driver = opened.driver;
  find(&driver.cuCtxGetCurrent, "cuCtxGetCurrent");
  find(&driver.cuCtxGetDevice, "cuCtxGetDevice");
  find(&driver.cuDeviceGetAttribute, "cuDeviceGetAttribute");
  find(&driver.cuFuncSetAttribute, "cuFuncSetAttribute");
  find(&driver.cuGetErrorString, "cuGetErrorString");
  find(&driver.cuMemsetD32Async, "cuMemsetD32Async");
  find(&driver.cuLaunchKernel, "cuLaunchKernel");
  find(&driver.cuModuleGetFunction, "cuModuleGetFunction");
  find(&driver.cuModuleLoadData, "cuModuleLoadData");
  find(&driver.cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
  *reinterpret_cast<void**>(&driver.cuTensorMapEncodeTiled) =
      dlsym(library, "cuTensorMapEncodeTiled");
  return opened;
}

}  // namespace

SpattnStatus Driver::Check(int code, const char* call) const {
  if (code == 0) return Ok();
  const char* text = nullptr;
  if (cuGetErrorString(code, &text) != 0) text = "an error the driver does not know";
  return Failed(SPATTN_INTERNAL, "%s: %s (%d)", call, text, code);
}

SpattnStatus OpenDriver(const Driver** driver) {
  static const Opened opened = Open();
  *driver = &opened.driver;
  return opened.status;
}

}  // namespace spattn
