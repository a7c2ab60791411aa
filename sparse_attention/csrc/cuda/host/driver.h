// driver.h — the few functions of NVIDIA's driver that a launch takes, found at run time: nothing
// here needs CUDA's headers, and a machine without a driver loads the library all the same.
#ifndef SPARSE_ATTENTION_CUDA_HOST_DRIVER_H_
#define SPARSE_ATTENTION_CUDA_HOST_DRIVER_H_

#include "abi/status.h"

namespace spattn {

using CuHandle = void*;  // CUcontext, CUmodule, CUfunction, CUstream

struct Driver {
  int (*cuCtxGetCurrent)(CuHandle* context);
  int (*cuCtxGetDevice)(int* device);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuFuncSetAttribute)(CuHandle function, int attribute, int value);
  int (*cuGetErrorString)(int code, const char** text);
  int (*cuLaunchKernel)(CuHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z,
                        unsigned shared_memory, CuHandle stream, void** arguments, void** extra);
  int (*cuMemsetD32Async)(uint64_t address, unsigned value, size_t count, CuHandle stream);
  int (*cuModuleGetFunction)(CuHandle* function, CuHandle module, const char* name);
  int (*cuModuleLoadData)(CuHandle* module, const void* code);
  int (*cuThreadExchangeStreamCaptureMode)(int* mode);
  // Null in drivers older than CUDA 12.
  int (*cuTensorMapEncodeTiled)(void* map, int type, unsigned rank, void* address,
                                const uint64_t* sizes, const uint64_t* strides, const unsigned* box,
                                const unsigned* element_strides, int interleave, int swizzle,
                                int l2_promotion, int fill);

  // The status of a driver call that returned `code`.
  SpattnStatus Check(int code, const char* call) const;
};

// Values of the driver's enumerations.
constexpr int kCaptureRelaxed = 2;
constexpr int kFuncMaxDynamicSharedMemory = 8;
constexpr int kDeviceMultiprocessors = 16;
constexpr int kDeviceCapabilityMajor = 75, kDeviceCapabilityMinor = 76;
constexpr int kTensorMapFloat16 = 6, kTensorMapBfloat16 = 9;
constexpr int kTensorMapSwizzle128 = 3, kTensorMapPromote256 = 3;

// Opens the driver, once; safe from any thread.
SpattnStatus OpenDriver(const Driver** driver);

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_DRIVER_H_
