// modules.h — from what a kernel is specialised for to its launch.
//
// Kernels are found by the struct of integers that specialises them (SpattnCudaShape, say), which
// costs a look into a table. What a kernel is compiled with, and its code, are made when it is first
// needed: SpattnCudaCode gives the code, and it stays loaded. Nobody who launches a kernel that is
// loaded waits for another that is being compiled.
#ifndef SPARSE_ATTENTION_CUDA_HOST_MODULES_H_
#define SPARSE_ATTENTION_CUDA_HOST_MODULES_H_

#include <string.h>

#include <array>
#include <type_traits>

#include "cuda/device/params.h"
#include "cuda/host/driver.h"

namespace spattn {

constexpr int64_t kMaxGrid = 65535;  // in y and z; kMaxGridX in x
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;

// Bytes of shared memory that one CTA may use.
int SharedMemoryOf(int arch);

inline int ElementSize(int dtype) { return dtype == SPATTN_FLOAT32 ? 4 : 2; }

// The bytes of shared memory in which a warp turns wmma's fragments, `columns` at a time, into rows:
// the same number as ScratchBytes in matmul.cuh.
inline int ScratchBytes(int columns, int dtype, int arch) {
  const bool has_wmma = dtype != SPATTN_FLOAT32 && arch < 80;
  return has_wmma ? 16 * (20 * 4 + (columns + 8) * 2) : 0;
}

// Adds "-DSPATTN_<name>=<value>" to what a kernel is compiled with.
void Define(SpattnCudaKernel* kernel, const char* name, int value);

// A kernel that is loaded into a context.
struct LoadedKernel {
  SpattnCudaKernel config;
  CuHandle function;
};

// What tells one kernel from another: its number (a SpattnPhase, or kFirstBlocksKernel + a
// SpattnBlocksOp) and the integers of the struct that specialises it.
using KernelKey = std::array<int32_t, 13>;
constexpr int kFirstBlocksKernel = 16;

// A CUDA stream of the context that is current.
class Stream {
 public:
  SpattnStatus Open(void* stream);

  int arch() const { return arch_; }  // compute capability, as 80 of 8.0

  SpattnStatus CountMultiprocessors(int* count) const;

  // Makes a map of a tensor [batch, rows, heads, dim] in boxes of 64 columns and `box_rows` rows, 16-bit
  // elements; false where the driver cannot.
  bool MakeMap(const SpattnTensor& tensor, int dtype, int64_t batch, int64_t rows, int heads,
               int dim, int box_rows, SpattnTensorMap* map) const;

  // Zeroes `count` words of device memory.
  SpattnStatus Zero(void* words, int64_t count) const;

  // The kernel of a shape. Where it is not loaded, configure(shape, number, &config) says how it is
  // compiled; an error of it, or of the compiler, is returned, and the next call tries again.
  template <class Shape>
  SpattnStatus Find(const Shape& shape, int number,
                    SpattnStatus (*configure)(const Shape&, int, SpattnCudaKernel*),
                    const LoadedKernel** kernel) const {
    static_assert(sizeof(Shape) + sizeof(int32_t) <= sizeof(KernelKey), "a longer key is needed");
    static_assert(std::has_unique_object_representations_v<Shape>, "padding would be compared");
    KernelKey key = {number};
    memcpy(&key[1], &shape, sizeof(Shape));
    struct Closure {
      const Shape& shape;
      int number;
      SpattnStatus (*configure)(const Shape&, int, SpattnCudaKernel*);
    } closure = {shape, number, configure};
    const auto call = [](const void* closure, SpattnCudaKernel* config) {
      const Closure* c = static_cast<const Closure*>(closure);
      return c->configure(c->shape, c->number, config);
    };
    return FindByKey(key, &closure, call, kernel);
  }

  // Launches a grid of x * y * z CTAs, which may be empty. `params` is the kernel's one argument.
  SpattnStatus Launch(const LoadedKernel& kernel, const void* params, int64_t x, int64_t y,
                      int64_t z) const;

 private:
  using CallConfigure = SpattnStatus (*)(const void* closure, SpattnCudaKernel* config);

  SpattnStatus FindByKey(const KernelKey& key, const void* closure, CallConfigure configure,
                         const LoadedKernel** kernel) const;

  const Driver* driver_ = nullptr;
  CuHandle context_ = nullptr, stream_ = nullptr;
  int arch_ = 0;
};

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_MODULES_H_
