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
#ifndef SPARSE_ATTENTION_ABI_CORE_H_
#define SPARSE_ATTENTION_ABI_CORE_H_

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
  int32_t allow_tf32;         // not 0: on CUDA, factors of float32 products may be rounded to TF32
} SpattnProblem;

// What stands between q kT and the softmax besides the plan. All zeros: nothing does. In this order:
//   s_ij = softmax_scale * <q_i, k_j>
//   s_ij = c tanh(s_ij / c)                                      c = logit_softcap
//   s_ij = s_ij - alibi_slopes[h] |i - j|
//   s_ij = s_ij + relative_bias[h][clip(i - j, 1 - R, R - 1) + R - 1]     R = bias_reach
//   s_ij = -inf unless q_segments[i] = kv_segments[j] >= 0 and mask[i, j]
//   p_ij = exp(s_ij - lse_i), and in o kept with probability 1 - dropout_rate and divided by it
// i is the row of the query plus q_offset, j the row of the key.
typedef struct {
  float logit_softcap;         // 0: none
  float dropout_rate;          // in [0, 1)
  int64_t q_offset;            // in (-2^31, 2^31)
  const float* alibi_slopes;   // [heads] or null
  const float* relative_bias;  // [bias_heads, 2 * bias_reach - 1] or null
  int64_t bias_heads;          // heads of the problem, or 1: shared between them
  int64_t bias_reach;
  const int32_t* q_segments;    // [batch, q_len] or null; negative: attends to nothing
  const int32_t* kv_segments;   // [batch, kv_len] or null, as q_segments
  const uint8_t* mask;          // or null; 0: does not attend
  int64_t mask_strides[4];      // of batch, heads, query rows and key rows; 0: shared between them
  const int64_t* dropout_seed;  // [2]; abi/score_rule.h says what is made of it
} SpattnScoreRule;

// A tensor [batch, rows, heads, dim]; strides in elements, dim contiguous.
typedef struct {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
} SpattnTensor;

// ---- plan ----

// Which keys each q tile reads: a CSR list of kv blocks for every (plan head, q tile).
typedef struct {
  int32_t heads;               // heads of the problem, or 1: shared between them
  int32_t tile_q, block_size;  // positions in a q tile and in a kv block: 8, 16, 32, 64 or 128
  // ceil(positions / block). A plan may be made for more positions than there are where row_stride
  // is 1: what lies past q_len and kv_len does not exist.
  int64_t q_tiles, kv_blocks;
  int64_t entries;            // length of kv_indices and mask_ids
  int64_t mask_blocks;        // length of mask_bits' first dimension
  const int32_t* kv_indptr;   // [heads * q_tiles + 1] offsets into kv_indices, from 0 to entries
  const int32_t* kv_indices;  // [entries] kv block, increasing within a q tile
  const int32_t* mask_ids;    // [entries] -1: FULL, no mask; otherwise which block of mask_bits
  const uint8_t*
      mask_bits;  // [mask_blocks, block_size, tile_q / 8] bit q mod 8 of byte q / 8 is set
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
  SpattnScoreRule rule;
} SpattnFwdParams;

typedef struct {
  SpattnProblem problem;
  SpattnPlan plan;
  SpattnTensor q, k, v, o, dout;  // read
  const float* lse;               // [batch, heads, q_len]
  const float* dlse;              // [batch, heads, q_len] gradient of lse, or null: zero
  SpattnTensor dq, dk, dv;        // written, every element
  SpattnScoreRule rule;
  float* drelative_bias;  // [bias_heads, 2 * bias_reach - 1] written, every element; or null
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

// ---- fused attention on CUDA ----
//
// The same structs; every pointer, kv_lengths and a plan's arrays too, is in memory of the device
// whose context is current. The calls check sizes, strides and alignment, and return once the
// kernels are on the stream; of values in device memory, those out of range count as absent.
//
// Kernels are found, or compiled, when first needed, by SpattnCudaCode: what there is of CUDA on a
// machine, where code is cached and who is told is the caller's affair. They stay loaded.

// The transpose of a SpattnPlan, for kernels that own keys: which q blocks each kv tile reads. A
// tile gathers kv blocks that nearly the same queries read, be they neighbours or not.
typedef struct {
  int32_t heads;       // heads of the problem, or 1: shared between them
  int32_t block_size;  // positions in a kv block and in a q block
  int32_t tile_kv;     // keys in a tile: 32, 64 or 128, at least block_size
  int64_t kv_tiles, q_blocks;
  int64_t entries;             // length of q_indices and mask_ids
  int64_t mask_blocks;         // length of mask_bits' first dimension
  const int32_t* tile_blocks;  // [kv_heads (1 if heads is), kv_tiles, tile_kv / block_size] kv
                               // blocks of a tile, each in one tile of a head; -1: none
  const int32_t* q_indptr;     // [heads * kv_tiles + 1] offsets into q_indices
  const int32_t* q_indices;    // [entries] q block, increasing within a tile
  const int32_t* mask_ids;     // [entries] -1: FULL; otherwise which block of mask_bits
  const uint8_t* mask_bits;    // [mask_blocks, block_size, tile_kv / 8] bit k mod 8 of byte k / 8
                               // is set where the query attends to key k of the tile
} SpattnKvPlan;

// What a kernel is specialised for.
typedef struct {
  int32_t arch;                         // compute capability: 80 is sm_80
  int32_t dtype, head_dim, head_dim_v;  // SpattnProblem's
  int32_t is_row_strided;               // row_stride > 1
  int32_t is_scale_positive;            // softmax_scale > 0
  int32_t uses_tf32;                    // float32 on tensor cores
  int32_t block_size;                   // of the plan and of its transpose
  int32_t tile_q, tile_kv;              // of the plan and of its transpose
  int32_t list_keys;  // of a q tile, on average, for SPATTN_FWD; for SPATTN_BWD and
                      // those behind it queries of a kv tile; else 0
  int32_t rule;       // SpattnRuleParts of the SpattnScoreRule, or 0
} SpattnCudaShape;

// What of a SpattnScoreRule is in use, bit by bit.
typedef enum {
  SPATTN_RULE_SOFTCAP = 1,
  SPATTN_RULE_ALIBI = 2,
  SPATTN_RULE_BIAS = 4,
  SPATTN_RULE_SEGMENTS = 8,  // also a mask that is the same for all heads and queries
  SPATTN_RULE_MASK = 16,
  SPATTN_RULE_DROPOUT = 32,
  SPATTN_RULE_BIAS_SUMS = 64,  // the gradient of relative_bias
} SpattnRuleParts;

typedef enum {
  SPATTN_FWD = 0,
  SPATTN_BWD_DELTA = 1,
  SPATTN_BWD_DQ = 2,
  SPATTN_BWD_DKV = 3,
  SPATTN_RULE_WORDS = 4,   // what dropout needs of each row
  SPATTN_RULE_RANGES = 5,  // of the segments in each block
  SPATTN_RULE_LISTS = 6,   // the plan's, without the blocks of which no pair may attend
  SPATTN_RULE_BIAS_GRADIENT = 7,
  SPATTN_RULE_PAIRS = 8,  // what a mask allows between two blocks
  SPATTN_BWD = 9,  // in place of SPATTN_BWD_DQ and SPATTN_BWD_DKV, where there is such a kernel
  SPATTN_BWD_RANKS = 10,   // before it: the order in which it adds up dq
  SPATTN_BWD_FINISH = 11,  // after it: dq
} SpattnPhase;

typedef struct {
  char name[32];          // of the kernel, and of its file cuda/device/<name>.cu; "": there is none
  char macros[512];       // what it is compiled with: "-DSPATTN_DTYPE=1 -DSPATTN_..."
  int32_t shared_memory;  // bytes of a CTA
  int32_t threads;        // of a CTA
  int32_t splits;         // CTAs that share a tile
} SpattnCudaKernel;

// Gives a kernel's code, as cuModuleLoadData takes it: it stays valid until the next call. Called
// by one thread at a time, in the middle of spattn_fwd_cuda or spattn_bwd_cuda.
typedef void (*SpattnCudaCode)(const SpattnCudaKernel* kernel, int32_t arch, const void** code,
                               SpattnStatus* status);

// Where kernels come from, before the first call. arch: what to compile for; 0: the device's own.
SPATTN_API void spattn_cuda_set_code(SpattnCudaCode code, int32_t arch);

// Sets tile_q and tile_kv to the largest, up to 128, whose kernels fit the device's shared memory.
SPATTN_API void spattn_cuda_tiles(SpattnCudaShape* shape);
SPATTN_API void spattn_cuda_kernel(const SpattnCudaShape* shape, int32_t phase,
                                   SpattnCudaKernel* kernel);

// Bytes of workspace at a multiple of 64 that a call needs; 0: it may be null. Where SPATTN_BWD may
// run, a backward call needs 4 bytes for every element of q and less for all else.
SPATTN_API SpattnStatus spattn_fwd_cuda_workspace(const SpattnFwdParams* params, int64_t* bytes);
SPATTN_API SpattnStatus spattn_bwd_cuda_workspace(const SpattnBwdParams* params,
                                                  const SpattnKvPlan* by_kv, int64_t* bytes);
// A null dq, or null dk and dv, is left out.
SPATTN_API SpattnStatus spattn_fwd_cuda(const SpattnFwdParams* params, void* stream,
                                        void* workspace);
SPATTN_API SpattnStatus spattn_bwd_cuda(const SpattnBwdParams* params, const SpattnKvPlan* by_kv,
                                        void* stream, void* workspace);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "baseline". The environment variable
// SPARSE_ATTENTION_ISA names another.
SPATTN_API const char* spattn_cpu_isa(void);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SPARSE_ATTENTION_ABI_CORE_H_
