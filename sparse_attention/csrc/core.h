// core.h — the C ABI between the kernels and whoever calls them.
//
// The one seam of this project: the kernels below it know no TensorFlow and are C++17 (or CUDA); the
// binding above it knows no kernel and is compiled as whatever standard its TensorFlow wants.
//
// Laws of the core: it allocates nothing (the caller gives the workspace), starts no thread (the
// caller gives SpattnThreads), prints nothing, and returns a SpattnStatus. No value in a plan, whoever
// made it, makes it read or write outside the arrays it was given.
//
// Words: a *position* is where the plan puts a query or a key; a *row* is where the tensor keeps it.
// They differ only where row_stride > 1 (see SpattnProblem), which is how `strided` attention runs
// without a transposed copy.
#ifndef SPARSE_ATTENTION_CORE_H_
#define SPARSE_ATTENTION_CORE_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPATTN_API __attribute__((visibility("default")))

// ---- status ----

typedef enum {
  SPATTN_OK = 0,
  SPATTN_INVALID_ARGUMENT = 1,  // a size, a plan value or a pointer is not what it must be
  SPATTN_UNSUPPORTED = 2,       // well-formed, but no kernel for it here
  SPATTN_INTERNAL = 3,          // the device or its driver failed
} SpattnCode;

typedef struct {
  int32_t code;       // SpattnCode
  char message[252];  // what was wrong, the value, what was expected; "" when code is SPATTN_OK
} SpattnStatus;

// ---- problem ----

typedef enum { SPATTN_FLOAT32 = 0, SPATTN_FLOAT16 = 1, SPATTN_BFLOAT16 = 2 } SpattnDtype;

// Sizes of one attention call. Tensors are [batch, rows, heads, dim] through SpattnTensor's strides.
typedef struct {
  int64_t batch, q_len, kv_len;  // rows
  int32_t heads, kv_heads;  // kv_heads divides heads: head h reads kv head h / (heads / kv_heads)
  int32_t head_dim, head_dim_v;  // multiples of 8, at most 256
  int32_t dtype;                 // SpattnDtype of q, k, v, o and their gradients
  float softmax_scale;           // multiplies QK^T
  // Positions visit the rows residue by residue: with n = ceil(len / row_stride), position p is row
  // (p mod n) * row_stride + p / n, and does not exist where that is no row. 1: position = row.
  int64_t row_stride;
  const int32_t* kv_lengths;  // [batch] or null: keys in rows at or past it do not exist
} SpattnProblem;

// A tensor [batch, rows, heads, dim]; strides in elements, dim contiguous.
typedef struct {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
} SpattnTensor;

// ---- plan ----

// Which keys each q tile reads: a CSR list of kv blocks for every (plan head, q tile).
typedef struct {
  int32_t heads;               // heads of the problem, or 1: shared between them
  int32_t block_q, block_kv;   // positions in a q tile and in a kv block: 8, 16, 32, 64 or 128
  int64_t q_tiles, kv_blocks;  // ceil(positions / block)
  int64_t entries;             // length of kv_indices and mask_ids
  int64_t mask_blocks;         // length of mask_bits' first dimension
  const int32_t* kv_indptr;    // [heads * q_tiles + 1] offsets into kv_indices, from 0 to entries
  const int32_t* kv_indices;   // [entries] kv block, increasing within a q tile
  const int32_t* mask_ids;     // [entries] -1: FULL, no mask; otherwise which block of mask_bits
  const uint8_t*
      mask_bits;  // [mask_blocks, block_kv, block_q / 8] bit q mod 8 of byte q / 8 is set
                  // where the query attends to the key
} SpattnPlan;

// ---- threads ----

// Calls work(arg, w) once for every w in [0, workers), at the same time where it can, and returns when
// all are done. workers <= 1 or run == null: the core works in the calling thread.
typedef struct {
  int32_t workers;
  void* pool;  // handed back as run's first argument
  void (*run)(void* pool, int32_t workers, void (*work)(void* arg, int32_t worker), void* arg);
} SpattnThreads;

// ---- fused attention ----
//
//   s_ij = softmax_scale * <q_i, k_j>          lse_i = log sum_j exp(s_ij)      (allowed j only; nats)
//   o_i  = sum_j exp(s_ij - lse_i) * v_j       no allowed j: o_i = 0, lse_i = -inf, zero gradients

typedef struct {
  SpattnProblem problem;
  SpattnPlan plan;
  SpattnTensor q, k, v;  // read
  SpattnTensor o;        // written, every element
  float* lse;            // [batch, heads, q_len], written, every element
} SpattnFwdParams;

typedef struct {
  SpattnProblem problem;
  SpattnPlan plan;
  SpattnTensor q, k, v, o, dout;  // read
  const float* lse;               // [batch, heads, q_len]
  const float* dlse;              // [batch, heads, q_len] gradient of lse, or null: zero
  SpattnTensor dq, dk, dv;        // written, every element
} SpattnBwdParams;

// Bytes of 64-byte aligned workspace that the call needs with that many workers. Results do not
// depend on the number of workers, bit for bit.
SPATTN_API SpattnStatus spattn_fwd_cpu_workspace(const SpattnFwdParams* params, int32_t workers,
                                                 int64_t* bytes);
SPATTN_API SpattnStatus spattn_bwd_cpu_workspace(const SpattnBwdParams* params, int32_t workers,
                                                 int64_t* bytes);
SPATTN_API SpattnStatus spattn_fwd_cpu(const SpattnFwdParams* params, const SpattnThreads* threads,
                                       void* workspace);
SPATTN_API SpattnStatus spattn_bwd_cpu(const SpattnBwdParams* params, const SpattnThreads* threads,
                                       void* workspace);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "baseline". The environment variable
// SPARSE_ATTENTION_ISA lowers it.
SPATTN_API const char* spattn_cpu_isa(void);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SPARSE_ATTENTION_CORE_H_
