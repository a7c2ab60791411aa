// params.h — what the CUDA kernels are given: one struct by value, every pointer in device memory.
//
// A kernel owns one *tile* of rows of one side (queries in attention_fwd and attention_bwd_dq, keys
// in attention_bwd_dkv) and has *blocks* of the other side pass it. SpattnTilePlan says which,
// in either direction:
//
//   by queries  the SpattnPlan of core.h as it is: tiles = q_tiles, blocks = kv_blocks,
//               tile_blocks = null. Tile t is tile_q positions from t * tile_q on.
//   by keys     the transpose, at the layout's block_size: a tile gathers up to G kv blocks that
//               are wanted by nearly the same queries (they need not be neighbours: `fixed` puts
//               the summary blocks of four windows into one tile), and its list holds q blocks.
//
// Every value of a plan is checked where it is read; what is out of range is treated as absent.
#ifndef SPARSE_ATTENTION_CUDA_DEVICE_PARAMS_H_
#define SPARSE_ATTENTION_CUDA_DEVICE_PARAMS_H_

#include "abi/core.h"

typedef struct {
  int32_t heads;               // heads of the problem, or 1: shared between them
  int32_t tiles;               // tiles of the owned side
  int32_t blocks;              // blocks of the passing side
  int32_t entries;             // length of indices and mask_ids
  int32_t mask_blocks;         // length of mask_bits' first dimension
  const int32_t* tile_blocks;  // [heads * tiles, G] owned blocks of each tile, -1: none; or null
  const int32_t* indptr;       // [heads * tiles + 1] offsets into indices
  const int32_t* indices;      // [entries] passing block
  const int32_t* mask_ids;     // [entries] -1: FULL; otherwise which block of mask_bits
  const uint8_t*
      mask_bits;  // [mask_blocks, passing rows of a block, tile rows / 8] little-endian bits,
                  // set where the pair is allowed
} SpattnTilePlan;

typedef struct {
  SpattnProblem problem;
  SpattnTilePlan by_q;
  SpattnTensor q, k, v;  // read
  SpattnTensor o;        // written
  float* lse;            // [batch, heads, q_len] written
} SpattnCudaFwdParams;

// A CUtensorMap: where a tensor lies, and boxes of which size the copy engine brings of it.
typedef struct alignas(64) {
  uint64_t words[16];
} SpattnTensorMap;

typedef struct {
  SpattnTensorMap k, v;  // boxes of 64 columns and a plan block's rows; zeros past the dim
  SpattnCudaFwdParams call;
  int32_t tiles;                  // parts of a head
  int32_t section_heads;          // heads whose parts take turns
  int32_t wave_ctas, wave_parts;  // so many CTAs have so many parts each, the others one
} SpattnCudaMappedFwdParams;

typedef struct {
  SpattnProblem problem;
  SpattnTilePlan by_q, by_kv;
  SpattnTensor q, k, v, o, dout;  // read
  SpattnTensor dq, dk, dv;        // written
  const float* lse;               // [batch, heads, q_len]
  const float* dlse;              // [batch, heads, q_len] or null
  // Workspace, written by attention_bwd_delta, read by the other two:
  float* lse_exp;  // [batch, heads, q_len] lse in the exponents' base (log2(e) * lse for the
                   // 16-bit types); +inf for an empty row, so that its p is 0
  float* delta;    // [batch, heads, q_len] rowsum(dO o O) - dlse
} SpattnCudaBwdParams;

// What attention_bwd_sm90 adds dq up in, and in which order (attention_bwd_ranks.cu). A *run* is what
// a plan block gives to a passing tile: run_rows queries, counted from 0 in each head. All of it is
// workspace.
typedef struct {
  float* dq;     // [batch, heads, runs, run_rows, columns], a run as attention_bwd_sm90.cu has it
  int32_t runs;  // of a head of a sequence; those that begin at or past q_len do not exist
  int32_t run_rows;          // a multiple of 8
  int32_t starts_with_last;  // of a head's kv tiles, rather than with the first
  // What has [sequences]: one for all, or where a rule leaves lists of each, the batch.
  // Zeroed, up to `lists`:
  uint64_t* copied;    // [sequences] entries that attention_bwd_ranks has made room for
  int32_t* started;    // CTAs of attention_bwd_sm90
  int32_t* additions;  // [batch, heads, runs] kv tiles whose part is in dq
  int32_t* listed;  // [sequences, plan heads, 2, blocks] of attention_bwd_ranks, or null: they fit
                    // its CTAs
  // The plan by keys as attention_bwd_ranks has copied it, each list to a place of its own:
  int32_t* lists;  // [sequences, plan heads * tiles, 2] where it begins and ends in the sequence's
  int32_t *indices, *mask_ids, *ranks;  // [sequences, entries]; index -1: absent
} SpattnCudaDqSums;

typedef struct {
  SpattnTensorMap q, dout;  // boxes of 64 columns and run_rows rows; zeros past the dim
  SpattnCudaBwdParams call;
  SpattnCudaDqSums sums;
} SpattnCudaMappedBwdParams;

// ---- score rules ----

// What there is among the pairs of two blocks, in any head.
enum SpattnPairKinds { SPATTN_SOME_ALLOWED = 1, SPATTN_SOME_FORBIDDEN = 2 };

// A SpattnScoreRule as the kernels take it. Kernels without a rule are given none, so they are the
// same with this as without; the others are given a SpattnCudaRuled.
typedef struct {
  float logit_softcap;
  // tanh of a small logit (score_rule.cuh), by the product x = <q, k>: where x^2 < cap_square it is
  // x * sum_i cap_terms[i] (x^2 - cap_square)^i. cap_exponents: the same for the capped score in the
  // base of exponents, which is 2.
  float cap_square, cap_terms[4], cap_exponents[4];
  float kept_times;            // 1 / (1 - dropout_rate)
  uint32_t dropout_threshold;  // bits of a weight that is kept are at least that
  int32_t q_offset;
  const float* alibi_slopes;                // [heads]
  const float* relative_bias;               // [bias_heads, 2 * bias_reach - 1]
  int32_t bias_heads, bias_reach;           // bias_heads 1: shared between heads
  const int32_t *q_segments, *kv_segments;  // [batch, rows] or null: all are in segment 0
  const uint8_t* kv_mask;  // [batch, rows] through its strides, or null; 0: in no segment
  int64_t kv_mask_strides[2];
  const uint8_t* mask;  // for SPATTN_RULE_MASK
  int64_t mask_strides[4];
  int32_t mask_is_aligned;  // 16 keys from a multiple of 16 on lie at a multiple of 16
  // Workspace, written by the kernels score_rule_*:
  uint32_t* key_words;             // [batch, heads, key_pitch]
  uint32_t* query_words;           // [batch, heads, query_pitch, 2] multipliers and addends
  int32_t key_pitch, query_pitch;  // rows, even
  int32_t* kv_ranges;  // [batch, kv blocks, 2] first and last segment of a block; first is -1 where
                       // a row is in none, last where all are; {2^31 - 1, -1} of no row at all
  int32_t* q_ranges;   // [batch, q blocks, 2]
  uint8_t* pair_kinds;  // [batch or 1, q blocks, kv blocks] SpattnPairKinds of `mask`; or null
  // Lists of a plan that are left, for each sequence: they begin where the plan's do. Of a mask id m
  // the list has m + 1, and kCheckPairs beside it where segments and mask must be looked at.
  const int32_t *q_tile_ends, *kv_tile_ends;  // [batch, plan heads * tiles]
  // The gradient of relative_bias, of slices of the queries, or of attention_bwd_sm90 of each kv tile of
  // each sequence; sum_reach is more than any distance, or bias_reach if that is less. With dropout
  // without the factor kept_times.
  float* bias_sums;  // [slices, heads, 2 * sum_reach - 1]
  int32_t slices, sum_reach;
} SpattnCudaRule;

template <class Call>
struct SpattnCudaRuled {
  Call call;
  SpattnCudaRule rule;
};

typedef struct {
  SpattnProblem problem;
  SpattnCudaRule rule;
  const int64_t* dropout_seed;
} SpattnCudaRuleWordsParams;

typedef struct {
  SpattnProblem problem;
  SpattnCudaRule rule;
  float* drelative_bias;  // [bias_heads, 2 * bias_reach - 1] written
} SpattnCudaRuleBiasParams;

typedef struct {
  SpattnProblem problem;
  SpattnCudaRule rule;
  int32_t block_size, q_blocks, kv_blocks;
} SpattnCudaRuleRangesParams;

typedef struct {
  SpattnProblem problem;
  SpattnCudaRule rule;
  int32_t block_size, q_blocks, kv_blocks;
  int32_t batch;  // of pair_kinds
} SpattnCudaRulePairsParams;

typedef struct {
  SpattnProblem problem;
  SpattnCudaRule rule;
  SpattnTilePlan plan;  // as the caller gave it
  int32_t is_by_kv;
  int32_t block_size, tile;            // positions in a block and in a tile
  int32_t q_blocks, kv_blocks;         // of pair_kinds
  int32_t pairs_batch;                 // of pair_kinds
  int32_t *indices, *mask_ids, *ends;  // what is left, written: [batch, entries] and ends
} SpattnCudaRuleListsParams;

#endif  // SPARSE_ATTENTION_CUDA_DEVICE_PARAMS_H_
