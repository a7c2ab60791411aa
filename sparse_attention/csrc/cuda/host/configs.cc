// configs.cc — chooses tiles, stages and warps of the kernels, and counts their shared memory.
//
// This is the tile policy as far as a GPU decides it. What the plan decides, how high q tiles and how
// wide kv tiles are, is in sparse_attention/plan/tiling.py.
#include "cuda/host/configs.h"

#include <stdio.h>

#include <algorithm>

#include "cuda/host/modules.h"

namespace spattn {
namespace {

int RoundUp(int a, int b) { return (a + b - 1) / b * b; }

int WidestDim(const SpattnCudaShape& s) { return std::max(s.head_dim, s.head_dim_v); }

bool IsWholePanels(int dim) { return dim == 64 || dim == 128; }

// attention_fwd_sm90 and attention_bwd_sm90 pad a dim to whole panels; fewer than 40 columns fill half of one at best.
bool FitsPanels(int dim) { return dim % 8 == 0 && dim >= 40 && dim <= 128; }
int WholePanels(int dim) { return RoundUp(dim, 64); }

// Whether attention_bwd_dq adds up the gradient of relative_bias.
bool SumsBias(const SpattnCudaShape& s, SpattnPhase phase) {
  return phase == SPATTN_BWD_DQ && (s.rule & SPATTN_RULE_BIAS_SUMS);
}

// How a kernel works: it owns a tile of one side, and tiles of the other side pass it.
struct Tiling {
  bool has_wgmma;
  int warps, min_ctas, stages;
  int passing, sub;   // rows of a passing tile; how many of them have their scores in registers
  int splits;         // CTAs that share a tile's columns
  bool in_registers;  // whether the tile's own rows stay there
  bool anew;          // addresses are derived for every passing tile: slower, fewer registers
  int shared_memory;  // bytes: `Smem::kBytes` of the kernel
};

int CountSharedMemory(const SpattnCudaShape& s, SpattnPhase phase, int tile, const Tiling& t) {
  const bool is_fwd = phase == SPATTN_FWD, is_dkv = phase == SPATTN_BWD_DKV;
  const int size = ElementSize(s.dtype), rows = std::max(tile, 16);
  const int padded_k = RoundUp(s.head_dim, 16) * size + 16;
  const int padded_v = RoundUp(s.head_dim_v, 16) * size + 16;  // and the pitch of stored rows
  const int pitch_k = t.has_wgmma ? s.head_dim * size : padded_k;
  const int pitch_v = t.has_wgmma ? s.head_dim_v * size : padded_v;
  const int own = is_fwd ? rows * (t.has_wgmma ? pitch_k : std::max(pitch_k, padded_v))
                         : rows * (pitch_k + pitch_v);
  const int mask_words = std::max((rows + 31) / 32, 1);
  const int words = !(s.rule & SPATTN_RULE_DROPOUT) ? 0 : is_dkv ? 8 : 4;
  const int stage = t.passing * (pitch_k + pitch_v + 4 * mask_words + (is_dkv ? 8 : 0) + words);
  const int align = t.has_wgmma ? 1024 : 16;
  const int scratch = ScratchBytes(t.sub, s.dtype, s.arch);
  const int sums = SumsBias(s, phase) ? RoundUp(rows * (t.sub + 1) * 4, 16) + 64 : 0;
  const int total =
      RoundUp(own, align) + t.stages * RoundUp(stage, align) + t.warps * scratch + sums;
  return is_fwd ? std::max(total, rows * padded_v) : total;
}

Tiling ChooseTiling(const SpattnCudaShape& s, SpattnPhase phase, int tile) {
  const bool is_fwd = phase == SPATTN_FWD, is_dkv = phase == SPATTN_BWD_DKV;
  const int size = ElementSize(s.dtype), widest = WidestDim(s);
  Tiling t = {};
  t.has_wgmma = s.arch == 90 && size == 2 && tile % 64 == 0 && IsWholePanels(s.head_dim) &&
                IsWholePanels(s.head_dim_v);
  const bool has_mma = (size == 2 && s.arch >= 80 && !t.has_wgmma) || s.uses_tf32;
  // A warp of 32 rows reads half as much shared memory per product as one of 16, but holds twice
  // the accumulators. 255 registers are enough up to a head_dim of 64, except that the backward pass
  // spills from sm_100 on.
  const bool is_tall = has_mma && widest <= 64 && tile >= 32 && (is_fwd || s.arch < 100);
  t.warps = std::max(tile, 16) / (is_tall ? 32 : 16);
  // Floats of the backward pass fill twice the shared memory: with 32 rows two CTAs share an SM.
  t.passing = widest * size <= 256 && (size == 2 || (s.uses_tf32 && is_fwd)) ? 64 : 32;
  t.sub = is_fwd ? t.passing : 32;
  if (t.has_wgmma) {
    // Two CTAs of 128 rows with head_dim 64, one with 128. Passing 128 rows at a time halves the
    // barriers (all, fwd: 6.1 for 6.7 ms) where shared memory allows two stages of them.
    const bool is_short = tile == 64 || (widest > 64 && is_dkv) || SumsBias(s, phase);
    t.passing = is_short ? 64 : 128;
    t.sub = 64;
  }
  t.min_ctas = t.has_wgmma && widest <= 64 && !is_dkv ? 2 : 1;
  t.stages = t.has_wgmma && t.passing == 64 && !SumsBias(s, phase) ? 3 : 2;
  t.splits =
      is_dkv && widest * size > 256 ? 2 : 1;  // the accumulators are two: share their columns
  t.in_registers = (is_dkv ? t.has_wgmma : has_mma) && widest * size <= 128;
  t.anew = !t.has_wgmma || (phase == SPATTN_BWD_DQ && widest <= 64);  // the others would spill
  t.shared_memory = CountSharedMemory(s, phase, tile, t);
  for (const int stages : {2, 1}) {  // narrower, then nothing on its way while one is worked on
    if (t.shared_memory <= SharedMemoryOf(s.arch) || t.has_wgmma) break;
    t.stages = stages;
    t.passing = t.sub = 32;
    t.shared_memory = CountSharedMemory(s, phase, tile, t);
  }
  return t;
}

// The largest tile whose kernel fits two stages in shared memory; 16 where none does.
int LargestTile(const SpattnCudaShape& shape, SpattnPhase phase) {
  int tile = 128;
  const auto fits = [&] {
    const Tiling t = ChooseTiling(shape, phase, tile);
    return t.stages > 1 && t.shared_memory <= SharedMemoryOf(shape.arch);
  };
  while (tile > 16 && !fits()) tile /= 2;
  return tile;
}

// Lists from which on attention_fwd_sm90 is faster than attention_fwd with head_dim 64, and three
// groups than two. ms of 4 x 16384 x 16 x 64 unless said, attention_fwd | two groups | three:
//     255 keys a list   local 128       0.308 | 0.359 | 0.406
//     576               all, 8 x 1024   0.076 | 0.078 | 0.089
//   1,116               local 1024      0.812 | 0.789 | 0.819
//   2,112               all, 16 x 4096  1.465 | 1.370 | 1.276
//   2,160               fixed 128       1.446 | 1.439 | 1.370
//   8,256               all             5.205 | 4.643 | 4.072
// With head_dim 128 it is faster for all of them: local 128 0.325 | 0.251, all 4.956 | 3.116.
// Other dims are treated as the next larger of these two, which was not measured.
constexpr int kLongList = 1024, kLongestList = 2048;

// A kernel without a rule is compiled as if there were no rules.
void DefineRule(SpattnCudaKernel* kernel, const SpattnCudaShape& s) {
  const int parts = s.rule & ~SPATTN_RULE_BIAS_SUMS;
  if (parts != 0) Define(kernel, "RULE", parts);
}

SpattnCudaKernel ConfigureFwdSm90(const SpattnCudaShape& s) {
  const int groups = FwdSm90PartQueries(s) / 64, stages = WidestDim(s) <= 64 ? 4 : 2;
  const int tile_kv = 128;
  const int queries =
      groups * 64 * (WholePanels(s.head_dim) + RoundUp(s.head_dim_v, 16) + 8) * 2;        // q, o
  const int stage = tile_kv * (WholePanels(s.head_dim) + WholePanels(s.head_dim_v)) * 2;  // k, v
  const int words = s.rule & SPATTN_RULE_DROPOUT ? 4 : 0;
  const int slot = tile_kv * (groups * 8 + 4 + words);  // mask, rows of its keys
  const int rule =                                      // ALiBi of tiles; bits of their keys
      (s.rule & SPATTN_RULE_ALIBI ? 640 : 0) + (s.rule & SPATTN_RULE_SEGMENTS ? 256 : 0);
  const int barriers = 2304 + rule;  // and lists
  const int shared_memory = queries + stages * stage + 2 * stages * slot + barriers;
  SpattnCudaKernel kernel = {"attention_fwd_sm90", "", shared_memory, (groups + 1) * 128, 1};
  const auto define = [&](const char* name, int value) { Define(&kernel, name, value); };
  define("DTYPE", s.dtype);
  define("TF32", 0);
  define("HEAD_DIM", s.head_dim);
  define("HEAD_DIM_V", s.head_dim_v);
  define("ROW_STRIDED", 0);
  define("PLAN_KV", s.block_size);
  define("SCALE_POSITIVE", 1);
  define("GROUPS", groups);
  define("STAGES", stages);
  define("ANEW", 1);
  define("WGMMA", 1);
  define("SHARED_MEMORY", shared_memory);
  DefineRule(&kernel, s);
  return kernel;
}

// Lists of queries from which on attention_bwd_sm90 is faster than attention_bwd_dq and attention_bwd_dkv, of
// which lists are even that have a quarter of all queries on average. ms of 4 x 16384 x 16 x 64 and of
// 4 x 16384 x 8 x 128 unless said, the two | last tile first | first tile first; H100:
//     337 queries a list  fixed 128, 16 x 2048 x 16      0.732 |       |         1.278 |       |
//     864                 local 1024, 16 x 2048 x 16     1.062 | 1.051 |
//     953                 fixed 128, 2 x 8192 x 16       0.811 | 0.859 | 0.756   1.473 | 1.742 | 1.398
//   1,080                 local 1024, 2 x 8192 x 16      0.651 | 0.669 | 0.674   1.203 | 1.216 | 1.260
//   1,088                 all, 16 x 2048 x 16            1.249 | 1.149 | 1.152   2.278 | 2.065 |
//   1,116                 local 1024                     2.514 | 2.524 | 2.514   2.368 | 2.431 | 2.553
//   1,772                 fixed 128                      4.596 | 4.175 | 4.178   4.479 | 5.352 | 4.190
//   4,160                 all, 2 x 8192 x 16             2.033 | 1.665 | 1.708   3.776 | 2.968 | 3.262
//   8,256                 all                           14.799 |11.606 |12.446  13.788 |10.471 |12.113
// Other dims are treated as the next larger of these two, which was not measured.
constexpr int kLongQueries = 768, kLongUnevenQueries = 1536;

bool IsEven(int64_t average, int64_t q_len) { return average * 4 >= q_len; }

// Queries of a passing tile: all that the registers hold the scores of.
int BwdSm90TileQ(const SpattnCudaShape& s) { return WidestDim(s) <= 64 ? 128 : 64; }

SpattnCudaKernel ConfigureBwdSm90(const SpattnCudaShape& s) {
  const int tile_kv = 128, tile_q = BwdSm90TileQ(s), stages = 2;
  const int dq_buffers = tile_q == 128 ? 2 : 1;
  const int dim = WholePanels(s.head_dim), dim_v = WholePanels(s.head_dim_v);
  const int finite = tile_q == 128 ? 64 : 128;  // columns of k for dq
  const int keys = tile_kv * (dim + dim_v + finite) * 2;
  const int stage =
      tile_q * ((dim + dim_v) * 2 + 2 * 4 + tile_kv / 8) + 128;  // q, do, numbers, mask
  const int scores = tile_kv * tile_q * 2;                       // ds
  const int dq = tile_q * BwdSm90DqColumns(s) * 4;
  const int barriers = 1024;  // and lists
  const int words = s.rule & SPATTN_RULE_DROPOUT ? stages * (tile_q * 8 + tile_kv * 4) : 0;
  const int beyond = s.rule & SPATTN_RULE_BIAS_SUMS ? 2 * 256 * 4 : 0;
  const int rule =
      s.rule == 0 ? 0 : 1600 + words + beyond;  // rows, segments of keys; blocks to look at
  const int shared_memory = keys + stages * stage + scores + dq_buffers * dq + barriers + rule;
  SpattnCudaKernel kernel = {"attention_bwd_sm90", "", shared_memory, 3 * 128, 1};
  const auto define = [&](const char* name, int value) { Define(&kernel, name, value); };
  define("DTYPE", s.dtype);
  define("TF32", 0);
  define("HEAD_DIM", s.head_dim);
  define("HEAD_DIM_V", s.head_dim_v);
  define("ROW_STRIDED", 0);
  define("PLAN_BLOCK", s.block_size);
  define("TILE_Q", tile_q);
  define("STAGES", stages);
  define("DQ_BUFFERS", dq_buffers);
  define("ANEW", 1);
  define("WGMMA", 1);
  define("SHARED_MEMORY", shared_memory);
  DefineRule(&kernel, s);
  if (s.rule & SPATTN_RULE_BIAS_SUMS) define("BIAS_SUMS", 1);
  return kernel;
}

// It looks at lists alone: those that a rule leaves are of one kind.
SpattnCudaKernel ConfigureBwdRanks(const SpattnCudaShape& s) {
  SpattnCudaKernel kernel = {"attention_bwd_ranks", "", 0, 512, 1};
  for (const char* zero : {"DTYPE", "TF32", "ROW_STRIDED", "ANEW", "WGMMA"}) {
    Define(&kernel, zero, 0);
  }
  Define(&kernel, "PLAN_BLOCK", s.block_size);
  Define(&kernel, "SHARED_BLOCKS", kRanksSharedBlocks);
  if (s.rule & (SPATTN_RULE_SEGMENTS | SPATTN_RULE_MASK)) {
    Define(&kernel, "RULE", SPATTN_RULE_SEGMENTS);
  }
  return kernel;
}

SpattnCudaKernel ConfigureBwdFinish(const SpattnCudaShape& s) {
  SpattnCudaKernel kernel = {"attention_bwd_finish", "", 0, 256, 1};
  Define(&kernel, "DTYPE", s.dtype);
  for (const char* zero : {"TF32", "ROW_STRIDED", "ANEW", "WGMMA"}) Define(&kernel, zero, 0);
  Define(&kernel, "HEAD_DIM", s.head_dim);
  return kernel;
}

// What prepares a rule depends on nothing but where rows lie.
SpattnCudaKernel ConfigureRule(const SpattnCudaShape& s, const char* name, int rule) {
  SpattnCudaKernel kernel = {"", "", 0, 256, 1};
  snprintf(kernel.name, sizeof(kernel.name), "%s", name);
  for (const char* zero : {"DTYPE", "TF32", "ANEW", "WGMMA"}) Define(&kernel, zero, 0);
  Define(&kernel, "ROW_STRIDED", s.is_row_strided);
  Define(&kernel, "RULE", rule);
  return kernel;
}

SpattnCudaKernel ConfigureDelta(const SpattnCudaShape& s) {
  SpattnCudaKernel kernel = {"attention_bwd_delta", "", 0, 256, 1};
  snprintf(kernel.macros, sizeof(kernel.macros),
           "-DSPATTN_DTYPE=%d -DSPATTN_TF32=%d -DSPATTN_HEAD_DIM_V=%d -DSPATTN_ROW_STRIDED=0 "
           "-DSPATTN_ANEW=0 -DSPATTN_WGMMA=0",
           s.dtype, s.uses_tf32, s.head_dim_v);
  return kernel;
}

}  // namespace

int RoundListKeys(int64_t average) {
  return average < kLongList ? 0 : average < kLongestList ? kLongList : kLongestList;
}

bool RunsFwdSm90(const SpattnCudaShape& s) {
  const int shortest = WidestDim(s) <= 64 ? kLongList : 0;
  return s.list_keys >= shortest && s.arch == 90 && ElementSize(s.dtype) == 2 && s.tile_q == 128 &&
         s.is_scale_positive && !s.is_row_strided && FitsPanels(s.head_dim) &&
         FitsPanels(s.head_dim_v);
}

// The accumulators of three groups fit the registers with head dims up to 64 alone, and with no rule
// beside them but ALiBi or a soft cap, which spill a few registers where a tile is masked or logits are
// large.
int FwdSm90PartQueries(const SpattnCudaShape& s) {
  const bool is_light = s.rule == 0 || s.rule == SPATTN_RULE_ALIBI || s.rule == SPATTN_RULE_SOFTCAP;
  return WidestDim(s) <= 64 && s.list_keys >= kLongestList && is_light ? 192 : 128;
}

int RoundListQueries(int64_t average, int64_t q_len) {
  const int shortest = IsEven(average, q_len) ? kLongQueries : kLongUnevenQueries;
  return average < shortest ? 0 : kLongQueries;
}

bool RunsBwdSm90(const SpattnCudaShape& s) {
  const int capped_bias = SPATTN_RULE_BIAS | SPATTN_RULE_SOFTCAP;
  return s.list_keys >= kLongQueries && s.arch == 90 && ElementSize(s.dtype) == 2 &&
         s.tile_kv == 128 && (s.rule & capped_bias) != capped_bias && !s.is_row_strided &&
         FitsPanels(s.head_dim) && FitsPanels(s.head_dim_v);
}

int BwdSm90RunRows(const SpattnCudaShape& s) { return std::min(s.block_size, BwdSm90TileQ(s)); }
int BwdSm90DqColumns(const SpattnCudaShape& s) { return RoundUp(s.head_dim, 16); }

// Half the longest list is what an SM waits at the end: little where it works on six times as much.
bool StartsWithLast(int64_t average, int64_t q_len, int64_t ctas, int multiprocessors) {
  return IsEven(average, q_len) && average * ctas >= 6 * q_len * multiprocessors;
}

void ChooseTiles(SpattnCudaShape* shape) {
  const int largest_q =
      std::min(LargestTile(*shape, SPATTN_FWD), LargestTile(*shape, SPATTN_BWD_DQ));
  shape->tile_q = std::max(shape->block_size, largest_q);
  shape->tile_kv = std::max({shape->block_size, 32, LargestTile(*shape, SPATTN_BWD_DKV)});
}

bool HasTf32(const SpattnCudaShape& s) { return s.dtype == SPATTN_FLOAT32 && s.arch >= 80; }

SpattnCudaKernel Configure(const SpattnCudaShape& shape, SpattnPhase phase) {
  SpattnCudaShape s = shape;
  if (!HasTf32(s)) s.uses_tf32 = 0;
  const bool is_bwd_sm90 =
      phase == SPATTN_BWD || phase == SPATTN_BWD_RANKS || phase == SPATTN_BWD_FINISH;
  if (is_bwd_sm90 && !RunsBwdSm90(s)) return {};
  switch (phase) {
    case SPATTN_BWD:
      return ConfigureBwdSm90(s);
    case SPATTN_BWD_RANKS:
      return ConfigureBwdRanks(s);
    case SPATTN_BWD_FINISH:
      return ConfigureBwdFinish(s);
    case SPATTN_BWD_DELTA:
      return ConfigureDelta(s);
    case SPATTN_RULE_WORDS:
      return ConfigureRule(s, "score_rule_words", SPATTN_RULE_DROPOUT);
    case SPATTN_RULE_RANGES:
      return ConfigureRule(s, "score_rule_ranges", SPATTN_RULE_SEGMENTS);
    case SPATTN_RULE_PAIRS:
      return ConfigureRule(s, "score_rule_pairs", SPATTN_RULE_MASK);
    case SPATTN_RULE_LISTS:
      return ConfigureRule(s, "score_rule_lists", SPATTN_RULE_SEGMENTS);
    case SPATTN_RULE_BIAS_GRADIENT:
      return ConfigureRule(s, "score_rule_bias", SPATTN_RULE_BIAS);
    default:
      break;
  }
  if (phase == SPATTN_FWD && RunsFwdSm90(s)) return ConfigureFwdSm90(s);
  const bool is_dkv = phase == SPATTN_BWD_DKV;
  const Tiling t = ChooseTiling(s, phase, is_dkv ? s.tile_kv : s.tile_q);
  SpattnCudaKernel kernel = {"", "", t.shared_memory, t.warps * 32, t.splits};
  snprintf(kernel.name, sizeof(kernel.name), "%s",
           is_dkv                ? "attention_bwd_dkv"
           : phase == SPATTN_FWD ? "attention_fwd"
                                 : "attention_bwd_dq");
  const auto define = [&](const char* name, int value) { Define(&kernel, name, value); };
  define("DTYPE", s.dtype);
  define("TF32", s.uses_tf32);
  define("HEAD_DIM", s.head_dim);
  define("HEAD_DIM_V", s.head_dim_v);
  define("ROW_STRIDED", s.is_row_strided);
  define(is_dkv ? "PLAN_BLOCK" : "PLAN_KV", s.block_size);
  define("TILE_Q", is_dkv ? t.passing : s.tile_q);
  define("TILE_KV", is_dkv ? s.tile_kv : t.passing);
  define(is_dkv ? "SUB_Q" : "SUB_KV", t.sub);
  define(is_dkv ? "KV_IN_REGISTERS" : "Q_IN_REGISTERS", t.in_registers);
  if (is_dkv) define("SPLITS", t.splits);
  if (phase == SPATTN_FWD) define("SCALE_POSITIVE", s.is_scale_positive);
  define("ANEW", t.anew);
  define("WGMMA", t.has_wgmma);
  define("WARPS", t.warps);
  define("MIN_CTAS", t.min_ctas);
  define("STAGES", t.stages);
  define("SHARED_MEMORY", t.shared_memory);
  DefineRule(&kernel, s);
  if (SumsBias(s, phase)) define("BIAS_SUMS", 1);
  return kernel;
}

}  // namespace spattn
