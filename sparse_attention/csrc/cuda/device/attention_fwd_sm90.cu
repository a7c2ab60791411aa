// attention_fwd_sm90.cu — block-sparse attention, forward, on sm_90a: one warp group copies, the
// others multiply.
//
// The math, and what an empty row, a masked NaN and a bad plan value come to, are attention_fwd.cu's.
//
// Mapping: one CTA an SM. A *part* is kGroups * 64 queries of a head of a sequence. The CTAs of the
//          first wave, one for each SM, have several parts each; the others, one part each, fill up
//          what the first wave left uneven (Part). Warp groups 0 to kGroups - 1 multiply, each with
//          64 queries of the part. Of the last warp group, warp 0 reads the lists and starts the
//          copies (Copy), and warps 1 to 3 see to tiles that need a mask (Mask).
// Tiles:   q     [kGroups][64, head_dim]        brought by the group that owns it
//          k, v  [kStages][kTileKV, dim]        brought by the copy engine, a box for each block
//                in whole panels of 64 columns: those past the dim are zeros, and are multiplied up to
//                the next multiple of 16
//          mask  [kSlots][kTileKV]              words with a bit for each query of the part
//          o     [warps][16, head_dim_v]        on its way out
//          s_frag [64, kTileKV], o_frag [64, head_dim_v] f32 and p_frag [64, kTileKV] T of a group:
//          registers, which the last warp group gave up (setmaxnreg)
// Lists:   three groups own one and a half tiles of the plan. The part takes the union of both
//          tiles' lists, which Copy merges, and where only one of them has a block there is a mask.
//
// Rules:   score_rule.cuh. Mask also sees to who attends to whom, and brings the words of every tile's keys
//          for dropout. ALiBi, a soft cap or a bias alone is part of the exponent in most tiles
//          (try_update). Where a tile's mask is the same for all queries it has 4 words instead of bits
//          of every query (KeyBits), and TryUpdate takes it as any other tile. Two groups: the
//          registers of three hold no more rules than ALiBi or a soft cap.
//
// Schedule of one multiplying group (of three; the others are a third of a round behind):
//
//   tensor cores  s(n) = q k(n)T | o += p(n-1) v(n-1) |   products of the other two groups    | ...
//   the group     waits          | exponentials of s(n), sums            | p(n) = T(s(n))     | ...
//
//   The exponentials of a tile take the SM as long as its products. So a group queues two products
//   at once, s(n) and the o of the tile before; it computes the exponentials of s(n) as soon as that
//   is there, beside its own o += p v and the others' products. The groups take turns at queueing:
//   without turns they all wait for products at one time and all compute exponentials at another.
//
// Barriers of tile n. Stage and slot are n modulo kStages and kSlots; n counts on through all parts.
//   of a stage   k_arrived, v_arrived    the copy engine: all bytes of a tile are there
//                k_released              the multiplying groups: the next tile may come
//                v_released              every multiplying warp, with one lane: the same
//   of a slot    listed                  Copy: `gathered` says what the tile is
//                mask_written            Mask: the mask is there, if the tile needs one
//                v_checked               Mask: v is finite, if the tile needs a mask
//   named        turns, one for each group; one among the warps of a group; one among Mask's
//   At all others every thread arrives that has written or read what other threads read or write, and these
//   wait there themselves: that orders their own accesses, as compute-sanitizer's racecheck sees too.
//
// Memory:  Smem; the table of bytes is in configs.cc.   Registers: 3 groups 160, copying group 32;
//          2 groups 216 and 72: the sum is what the launch gives.
// Numerics: as attention_fwd.cu, save that a row's shift may stay where a score exceeds it by up to
//          2^13 (OnlineSoftmax::TryUpdate). Bitwise deterministic: no atomics, no order of arrival
//          that a result could depend on.
// After:   Shah et al. 2024 (arXiv:2407.08608): producer and consumers, turns, overlap in a group.
// Measured: benchmarks/results/gpu_kernels_h100.txt, with what was tried.
#include "cuda/device/score_rule.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/warpgroup.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kPlanQ = 128;              // queries of a plan tile
constexpr int kPlanKV = SPATTN_PLAN_KV;  // keys of a plan block
constexpr int kGroups = SPATTN_GROUPS;   // that multiply
constexpr int kStages = SPATTN_STAGES;
constexpr int kSlots = 2 * kStages;
static_assert(kSlots >= kStages + 2, "slots outlive what the multiplying groups read of them");
constexpr int kThreads = (kGroups + 1) * kGroupThreads, kMaskThreads = 3 * 32;
constexpr int kGroupRows = 64, kTileQ = kGroups * kGroupRows, kMaskWords = kTileQ / 32;
constexpr int kTileKV = 128;
constexpr int kLists = kGroups == 3 ? 2 : 1;  // plan tiles that a part's queries lie in
constexpr int kGather = kTileKV / kPlanKV;    // blocks in a tile
constexpr int kN = kTileKV / 8, kOut = PaddedDim(kHeadDimV) / 8;
// Whether ALiBi is all that changes scores; then it is done here (Alibi), not by PanelRule.
constexpr bool kAlibiAlone = kHasAlibi && !kHasSoftcap && !kHasBias;
// The same of the soft cap, and of the bias. Each may be part of the exponent, for most tiles (try_update).
constexpr bool kCapAlone = kHasSoftcap && !kHasAlibi && !kHasBias;
constexpr bool kBiasAlone = kHasBias && !kHasAlibi && !kHasSoftcap;
constexpr bool kJoinsRule = kAlibiAlone || kCapAlone || kBiasAlone;
// Whether a tile's mask may be one of keys, the same for all queries.
constexpr bool kMasksKeys = kHasSegments && !kHasMask;
static_assert(!kMasksKeys || kLists == 1, "one list says which keys there are");
constexpr int kCopyRegisters = kGroups == 3 ? 32 : 72, kMathRegisters = kGroups == 3 ? 160 : 216;
static_assert(kGroups == 2 || kGroups == 3, "a tile of the plan, or one and a half");
static_assert(kStages >= 2 && (kStages & (kStages - 1)) == 0, "a tile's stage is a remainder");
static_assert(kHasWgmma && kHeadDim % 8 == 0 && kHeadDimV % 8 == 0, "whole units of 16 bytes");
static_assert(SPATTN_SCALE_POSITIVE, "the largest score is the largest <q, k>");

using QTile = Tile<kGroupRows, kHeadDim>;
using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;

template <int kTheValue>
struct Number {
  static constexpr int kValue = kTheValue;
};

// ---- work ----

// What a CTA computes at a time: kTileQ queries of a head of a sequence.
//
// Parts are numbered section by section. A section is as many heads as L2 holds the k and v of; in it
// the last queries of all heads come first, since they have the longest lists of a causal plan. CTA c
// of the first wave has parts c, c + wave_ctas, c + 2 wave_ctas, ...
struct Part {
  const SpattnCudaMappedFwdParams& mapped;
  const SpattnCudaFwdParams& params;  // mapped.call
  int index, head, kv_head, batch;    // queries from position index * kTileQ on

  DEVICE Part Make(const SpattnCudaMappedFwdParams& mapped, unsigned number) {
    const SpattnProblem& p = mapped.call.problem;
    const unsigned tiles = mapped.tiles, all_heads = p.batch * p.heads;
    const unsigned section = number / (mapped.section_heads * tiles);
    const unsigned within = number - section * mapped.section_heads * tiles;
    const unsigned first = section * mapped.section_heads;
    const unsigned heads = Min(mapped.section_heads, all_heads - first);
    const unsigned head = first + within % heads;
    const int heads_per_kv_head = p.heads / p.kv_heads;
    return {mapped,
            mapped.call,
            static_cast<int>(tiles - 1 - within / heads),
            static_cast<int>(head % p.heads),
            static_cast<int>(head % p.heads) / heads_per_kv_head,
            static_cast<int>(head / p.heads)};
  }

  __forceinline__ int FirstPlanTile() const { return index * kGroups * kGroupRows / kPlanQ; }
  // Rows of 32 queries that the first plan tile has before the part's.
  __forceinline__ int FirstMaskWord() const { return index * kMaskWords % (kPlanQ / 32); }
};

DEVICE int PartsOfCta(const SpattnCudaMappedFwdParams& mapped) {
  return static_cast<int>(blockIdx.x) < mapped.wave_ctas ? mapped.wave_parts : 1;
}
DEVICE Part PartOfCta(const SpattnCudaMappedFwdParams& mapped, int i) {
  const unsigned wave = mapped.wave_ctas, before = blockIdx.x < wave ? i : mapped.wave_parts - 1;
  return Part::Make(mapped, blockIdx.x + before * wave);
}

DEVICE RowMap KvRows(const Part& part) {
  const SpattnProblem& problem = part.params.problem;
  return RowMap::Make(problem.kv_len, problem.row_stride,
                      problem.kv_lengths ? problem.kv_lengths[part.batch] : problem.kv_len);
}

// ---- lists ----

// A mask row that is none: all pairs of the block are allowed, or none are.
constexpr int kFull = -1, kAbsent = -2;

// With ALiBi lists are read from their ends: the largest scores of a causal row come first then, and
// TryUpdate need not raise its shift tile by tile. Blocks count down, so that the least is the next.
constexpr bool kReadsFromEnd = kHasAlibi;
DEVICE unsigned InOrder(unsigned block) { return kReadsFromEnd ? 0x7fffffffu - block : block; }

// What a passing tile consists of: block g gives its keys [g * kPlanKV, (g + 1) * kPlanKV).
struct Gathered {
  int first[kGather];             // first position, or -1
  int mask_row[kLists][kGather];  // of mask_bits, for each plan tile of the part; kFull; kAbsent
  int is_checked[kLeavesLists ? kGather : 1];  // for segments and mask
  int is_masked, is_last;                      // is_masked: 0, or how
};
constexpr int kByPairs = 1, kByKeys = 2;

// The blocks that the part's plan tiles list, in order. It lies in shared memory; one warp uses it.
struct UnionList {
  int at[kLists], end[kLists];  // what is left of each list
  bool exists[kLists];          // whether the plan has the tile: its rows need no mask otherwise
  RowMap kv_rows;
  int kv_head, batch;
  int64_t first_entry;  // where the lists that the rule has left for the sequence begin

  __forceinline__ void Init(const Part& part, const SpattnCudaRule& rule) {
    const SpattnTilePlan& plan = part.params.by_q;
    const int plan_head = plan.heads == 1 ? 0 : part.head, first_tile = part.FirstPlanTile();
    const int i = threadIdx.x % 32;
    __syncwarp();  // no lane reads the last part's any more
    if (i == 0) kv_rows = KvRows(part), kv_head = part.kv_head, batch = part.batch;
    if (kLeavesLists && i == 0) first_entry = static_cast<int64_t>(part.batch) * plan.entries;
    if (i < kLists) {
      exists[i] = first_tile + i < plan.tiles;
      const int32_t* indptr = plan.indptr + plan_head * plan.tiles + first_tile + i;
      at[i] = exists[i] ? Min(Max(__ldg(indptr), 0), plan.entries) : 0;
      const int32_t* ends = indptr + 1;
      if (kLeavesLists) {
        ends = rule.q_tile_ends + static_cast<int64_t>(part.batch) * plan.heads * plan.tiles +
               plan_head * plan.tiles + first_tile + i;
      }
      end[i] = exists[i] ? Min(__ldg(ends), plan.entries) : 0;
    }
    __syncwarp();
  }

  // Takes the next kGather blocks from the lists. Where none is left there is no block: such a tile is
  // masked, and so is the only tile of a part whose lists are empty.
  // checks_keys: what is to be checked is the same for all queries.
  __forceinline__ void Take(Gathered* to, const SpattnTilePlan& plan, bool checks_keys) {
    constexpr unsigned kNone = 0xffffffffu;
    constexpr int kStep = kReadsFromEnd ? -1 : 1;
    const int lane = Opaque(threadIdx.x) % 32;
    unsigned block[kLists];  // lane i: the list's block i from here on
    int mask_id[kLists], taken[kLists] = {};
    const int64_t list_at = kLeavesLists ? first_entry : 0;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int from = kReadsFromEnd ? end[i] - 1 - lane : at[i] + lane;
      const bool is_there = kReadsFromEnd ? from >= at[i] : from < end[i];
      block[i] = is_there ? InOrder(__ldg(plan.indices + list_at + from)) : kNone;
      mask_id[i] = is_there ? __ldg(plan.mask_ids + list_at + from) : 0;
    }
    // Lane g finds what block g of the tile is: the least block ahead, and where each list has it.
    unsigned my_block = kNone;
    int my_place[kLists];
    const auto least_ahead = [&](unsigned (&ahead)[kLists]) {
      unsigned least = kNone;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        ahead[i] = __shfl_sync(kFullWarp, block[i], taken[i]);
        least = ahead[i] < least ? ahead[i] : least;
      }
      return least;
    };
#pragma unroll
    for (int i = 0; i < kLists; ++i) my_place[i] = -1;
#pragma unroll 1
    for (int g = 0; g < kGather; ++g) {
      unsigned ahead[kLists];
      const unsigned least = least_ahead(ahead);
      if (lane == g) my_block = least;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        if (ahead[i] != least || least == kNone) continue;
        if (lane == g) my_place[i] = taken[i];
        ++taken[i];
      }
    }
    unsigned ahead[kLists];
    const bool is_last = least_ahead(ahead) == kNone;
    my_block = InOrder(my_block);
    bool is_masked = !(my_block < static_cast<unsigned>(plan.blocks)), is_checked = false;
    int first = is_masked ? -1 : static_cast<int>(my_block) * kPlanKV;
    int rows[kLists];
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const MaskId mask = MaskId::Of(__shfl_sync(kFullWarp, mask_id[i], my_place[i] & 31));
      const int id = mask.id;
      is_checked |= my_place[i] >= 0 && mask.is_checked;
      const bool is_valid = my_place[i] >= 0 && id >= -1 && id < plan.mask_blocks;
      rows[i] = !exists[i] || (is_valid && id < 0) ? kFull : is_valid ? id * kPlanKV : kAbsent;
      is_masked |= rows[i] != kFull;
    }
    is_masked |= !kv_rows.AllExist(Max(first, 0), kPlanKV) || is_checked;
    const bool by_pairs = rows[0] >= 0 || (is_checked && !checks_keys);
    if (lane < kGather) {
      to->first[lane] = first;
      if (kLeavesLists) to->is_checked[lane] = is_checked;
#pragma unroll
      for (int i = 0; i < kLists; ++i) to->mask_row[i][lane] = rows[i];
    }
    is_masked = __any_sync(kFullWarp, lane < kGather && is_masked);
    const bool by_keys = kMasksKeys && !__any_sync(kFullWarp, lane < kGather && by_pairs);
    __syncwarp();  // all lanes have read `at`
    if (lane == 0) {
      to->is_masked = !is_masked ? 0 : by_keys ? kByKeys : kByPairs, to->is_last = is_last;
#pragma unroll
      for (int i = 0; i < kLists; ++i) (kReadsFromEnd ? end[i] : at[i]) += kStep * taken[i];
    }
    __syncwarp();
  }
};

// ---- ALiBi ----

// ALiBi of a tile, where nothing else changes scores. It lies in shared memory, as registers are few.
//
// Where each block's keys are all before or all behind the part's queries, the distance is linear in the
// column. So it is one FFMA of constants of the thread for each score, and goes with the shift into the
// FFMA that scales.
struct Alibi {
  float slope;  // in the exponents' base
  int is_beside;
  int ahead[kGather];  // how far the part's first query is ahead of the first key of block g

  // Called by a warp; first_query: with q_offset.
  __forceinline__ void Init(const Gathered& tile, int first_query, float slope_exp) {
    const int lane = Opaque(threadIdx.x) % 32, my_ahead = first_query - tile.first[lane % kGather];
    const bool all_beside =
        __all_sync(kFullWarp, my_ahead >= kPlanKV - 1 || my_ahead <= 1 - kTileQ);
    if (lane < kGather) ahead[lane] = my_ahead;
    if (lane == 0) slope = slope_exp, is_beside = all_beside;
    __syncwarp();  // before one lane says for all that the tile is there
  }

  // How far this lane's row h is ahead of its first column of fragment n's block.
  __forceinline__ float Ahead(int n, int h) const {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    return static_cast<float>(ahead[n * 8 / kPlanKV] + row - column) + static_cast<float>(h * 8);
  }
  // A product as exponent less its row's shift, if is_beside. Column n * 8 + j.
  __forceinline__ float Exponent(float x, float scale, float shift, int h, int n, int j) const {
    const float rise = ahead[n * 8 / kPlanKV] < 0 ? -slope : slope;  // from a key to the next
    const float first = fmaf(-rise, Ahead(n, h), -shift);
    return fmaf(x, scale, fmaf(rise, static_cast<float>(n * 8 % kPlanKV + j), first));
  }
  // Products become scores in the exponents' base.
  __forceinline__ void Apply(float (&s)[1][kN][4], float scale) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float distance = Ahead(n, i / 2) - static_cast<float>(n * 8 % kPlanKV + i % 2);
        s[0][n][i] = fmaf(-slope, fabsf(distance), s[0][n][i] * scale);
      }
    }
  }
};

// ---- masks of keys ----

// Which of this lane's columns are allowed where a tile's mask is the same for all queries.
struct KeyBits {
  uint32_t words[kTileKV / 32];  // bit n % 4 * 8 + j of word n / 4: column j of fragment n

  DEVICE KeyBits Read(const uint32_t (&key_bits)[kTileKV / 32]) {
    const uint4 all = *reinterpret_cast<const uint4*>(key_bits);
    const int column = threadIdx.x % 4 * 2;
    return {{all.x >> column, all.y >> column, all.z >> column, all.w >> column}};
  }
  __forceinline__ bool Allow(int n, int j) const { return words[n / 4] >> (n % 4 * 8 + j) & 1; }
  // Scores of keys that are not allowed become -inf, whatever they were.
  __forceinline__ void Apply(float (&s)[1][kN][4]) const {
#pragma unroll
    for (int i = 0; i < kN * 4; ++i) {
      if (!Allow(i / 4, i % 2)) s[0][i / 4][i % 4] = -kInf;
    }
  }
};

// ---- shared memory ----

struct Smem {
  T q[kGroups][QTile::kSize];
  T k[kStages][KTile::kSize];
  T v[kStages][VTile::kSize];
  T o[kGroups * 4][16 * StorePitch(kHeadDimV)];
  // These are written for masked tiles alone, key_words for all:
  uint32_t mask[kSlots][kTileKV * kMaskWords];
  int key_rows[kSlots][kTileKV];                                            // -1: none
  int has_nonfinite[kSlots];                                                // v
  uint32_t key_words[kHasDropout ? kSlots : 1][kHasDropout ? kTileKV : 1];  // of every tile
  Gathered gathered[kSlots];
  UnionList list;
  Mbarrier k_arrived[kStages], k_released[kStages], v_arrived[kStages], v_released[kStages];
  Mbarrier listed[kSlots], mask_written[kSlots], v_checked[kSlots];
  Alibi alibi[kAlibiAlone ? kSlots : 1];
  alignas(16) uint32_t key_bits[kMasksKeys ? kSlots : 1][kTileKV / 32];  // of tiles masked by keys
};
static_assert(sizeof(Smem) <= SPATTN_SHARED_MEMORY, "the host counts fewer bytes");

// Named barriers; 0 is the CTA's.
constexpr int kMaskBarrier = 1, kTurnBarrier = 2, kGroupBarrier = kTurnBarrier + kGroups;

// The parity of the phase in which the barriers of a stage, and of a slot, are about tile n.
DEVICE int Parity(unsigned n) { return n / kStages & 1; }
DEVICE int SlotParity(unsigned n) { return n / kSlots & 1; }

// ---- the copying group ----
//
// Both of its roles are one tile ahead with k: k(n), then v(n - 1).

constexpr unsigned kUnknown = 0xffffffffu;  // no part's end

// The mask of the tile's key `key`, and where it lies: -1 if it is not there.
DEVICE int ReadMask(uint32_t (&words)[kMaskWords], const Gathered& tile, int key, const Part& part,
                    const RowMap& kv_rows) {
  const SpattnTilePlan& plan = part.params.by_q;
  const int g = key / kPlanKV, within = key % kPlanKV;
  const int row = tile.first[g] < 0 ? -1 : kv_rows.Row(tile.first[g] + within);
  uint32_t bits[kLists * 4];
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    const int mask_row = tile.mask_row[i][g];
    const uint32_t all = mask_row == kFull && row >= 0 ? kFullWarp : 0;
    uint4 read{all, all, all, all};
    if (row >= 0 && mask_row >= 0) {
      read = __ldg(reinterpret_cast<const uint4*>(plan.mask_bits) +
                   (static_cast<int64_t>(mask_row) + within));
    }
    bits[i * 4] = read.x, bits[i * 4 + 1] = read.y;
    bits[i * 4 + 2] = read.z, bits[i * 4 + 3] = read.w;
  }
  const bool is_second_half = part.FirstMaskWord() != 0;
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    words[w] = kLists == 2 && is_second_half ? bits[(w + 2) % (kLists * 4)] : bits[w];
  }
  return row;
}

// Warp 0. It alone reads the lists, so that all roles see the same tiles whoever writes to a plan.
DEVICE void Copy(Smem& smem, const SpattnCudaMappedFwdParams& mapped, const SpattnCudaRule& rule) {
  const SpattnProblem& problem = mapped.call.problem;
  const SpattnTilePlan& plan = mapped.call.by_q;
  unsigned n = 0;
#pragma unroll 1
  for (int i = 0; i < PartsOfCta(mapped); ++i) {
    // Each lane brings one block's rows of one panel. Rows that do not exist, and those of absent
    // blocks, become zeros.
    const auto start = [&](auto panels, T* tile, const SpattnTensorMap& map, unsigned n,
                           Mbarrier& arrived) {
      constexpr int kPanels = decltype(panels)::kValue, kBoxes = kGather * kPanels;
      const int lane = Opaque(threadIdx.x) % 32;  // registers: nothing of this outlives a tile
      const int g = lane % kGather, panel = lane / kGather;
      if (lane == 0) arrived.ArriveAndExpect(kTileKV * kPanels * 64 * sizeof(T));
      __syncwarp();
      if (lane >= kBoxes) return;
      const int first = smem.gathered[n % kSlots].first[g];
      CopyBox(tile + panel * kTileKV * 64 + g * kPlanKV * 64, map, panel * 64,
              first < 0 ? static_cast<int>(problem.kv_len) : first, smem.list.kv_head,
              smem.list.batch, arrived);
    };
    const auto start_v = [&](unsigned n) {
      const int stage = n % kStages;
      smem.v_released[stage].Wait(Parity(n) ^ 1);
      start(Number<VTile::kPanels>{}, smem.v[stage], mapped.v, n, smem.v_arrived[stage]);
    };
    const Part part = PartOfCta(mapped, i);
    smem.list.Init(part, rule);
    const int first_query = part.index * kTileQ + rule.q_offset;
    const float slope = kAlibiAlone ? __ldg(rule.alibi_slopes + part.head) * kExpScale : 0;
    const unsigned first = n;
    unsigned end = kUnknown;
#pragma unroll 1
    for (;; ++n) {
      if (n != end) {
        const int stage = n % kStages, slot = n % kSlots;
        // Mask does not look at the slot any more. Nor do the multiplying groups: this tile's
        // predecessor has waited for v of tile n - 2 - kStages, which is kSlots ago or later. The groups
        // wait for masks of masked tiles alone; somebody must for each, says synccheck.
        smem.mask_written[slot].Wait(SlotParity(n) ^ 1);
        smem.v_checked[slot].Wait(SlotParity(n) ^ 1);
        smem.list.Take(&smem.gathered[slot], plan, rule.q_segments == nullptr);
        if (smem.gathered[slot].is_last) end = n + 1;
        if (kAlibiAlone) smem.alibi[slot].Init(smem.gathered[slot], first_query, slope);
        smem.listed[slot].Arrive();
        smem.k_released[stage].Wait(Parity(n) ^ 1);
        start(Number<KTile::kPanels>{}, smem.k[stage], mapped.k, n, smem.k_arrived[stage]);
      }
      if (n != first) start_v(n - 1);
      if (n == end) break;
    }
  }
}

// Warps 1 to 3: the masks of tiles that need one, and v of these tiles without NaN and Inf.
DEVICE void Mask(Smem& smem, const SpattnCudaMappedFwdParams& mapped, const SpattnCudaRule& rule) {
  const int thread = threadIdx.x % kGroupThreads - 32;
  // Each warp has its own words of key_bits.
  const auto for_each_key_word = [&](auto work) {
#pragma unroll
    for (int i = 0; i < CeilDiv(kTileKV, kMaskThreads); ++i) {
      const int w = thread / 32 + i * (kMaskThreads / 32);
      if (w < kTileKV / 32) work(w);
    }
    __syncwarp();
  };
  const auto write_mask = [&](unsigned n, int i) {
    const int slot = n % kSlots;
    smem.listed[slot].Wait(SlotParity(n));
    if (kHasDropout) {
      const Part part = PartOfCta(mapped, Opaque(i));
      const RowMap kv_rows = KvRows(part);
      const uint32_t* words = KeyWords(rule, mapped.call.problem, part.batch, part.head);
#pragma unroll 1
      for (int key = thread; key < kTileKV; key += kMaskThreads) {
        const int first = smem.gathered[slot].first[key / kPlanKV];
        const int row = first < 0 ? -1 : kv_rows.Row(first + key % kPlanKV);
        smem.key_words[slot][key] = row < 0 ? 0 : __ldg(words + row);
      }
    }
    if (kMasksKeys && smem.gathered[slot].is_masked == kByKeys) {
      const Part part = PartOfCta(mapped, Opaque(i));
      const RowMap kv_rows = KvRows(part);
      for_each_key_word([&](int w) {
        const int key = w * 32 + threadIdx.x % 32, g = key / kPlanKV;
        const Gathered& tile = smem.gathered[slot];
        const int position = tile.mask_row[0][g] == kFull ? tile.first[g] + key % kPlanKV : -1;
        const int row = kv_rows.Row(position);
        const bool is_allowed =
            row >= 0 &&
            (!tile.is_checked[g] || KeySegment(rule, mapped.call.problem, part.batch, row) == 0);
        smem.key_bits[slot][w] = __ballot_sync(kFullWarp, is_allowed);
      });
    } else if (smem.gathered[slot].is_masked) {
      const Part part = PartOfCta(mapped, Opaque(i));
      const RowMap kv_rows = KvRows(part);
      const SpattnProblem& problem = mapped.call.problem;
      const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
      const auto restriction =
          Restrict<true, kPlanKV>(rule, problem, part.batch, part.head,
                                  [&](int r) { return q_rows.Row(part.index * kTileQ + r); });
#pragma unroll 1
      for (int key = thread; key < kTileKV; key += kMaskThreads) {
        uint32_t words[kMaskWords];
        const Gathered& tile = smem.gathered[slot];
        const int row = ReadMask(words, tile, key, part, kv_rows);
        smem.key_rows[slot][key] = row;
        if (kLeavesLists) {  // whole warps
          restriction.Apply(words, row, tile.is_checked[key / kPlanKV]);
        }
#pragma unroll
        for (int w = 0; w < kMaskWords; ++w) smem.mask[slot][key * kMaskWords + w] = words[w];
      }
    }
    smem.mask_written[slot].Arrive();
  };
  const auto check_v = [&](unsigned n) {
    const int slot = n % kSlots;
    if (kMasksKeys && smem.gathered[slot].is_masked == kByKeys) {
      // Nobody attends to these keys: whatever their v is, it must not meet p = 0.
      smem.v_arrived[n % kStages].Wait(Parity(n));
      for_each_key_word([&](int w) {
        const int lane = threadIdx.x % 32;
        if (smem.key_bits[slot][w] >> lane & 1) return;
#pragma unroll
        for (int column = 0; column < VTile::kColumns; column += kVector) {
          T* to = smem.v[n % kStages] + VTile::Offset(w * 32 + lane, column);
          *reinterpret_cast<uint4*>(to) = {0, 0, 0, 0};
        }
      });
      if (thread == 0) smem.has_nonfinite[slot] = 0;
      FenceForWgmma();
    } else if (smem.gathered[slot].is_masked) {
      smem.v_arrived[n % kStages].Wait(Parity(n));
      bool found = false;
      uint4* v_vectors = reinterpret_cast<uint4*>(smem.v[n % kStages]);
#pragma unroll 2
      for (int i = thread; i < VTile::kSize / kVector; i += kMaskThreads) {
        found |= ZeroNonfinite(v_vectors + i);
      }
      const bool any_found = BarrierOr(kMaskBarrier, kMaskThreads, found);
      if (thread == 0) smem.has_nonfinite[slot] = any_found;
      FenceForWgmma();
    }
    smem.v_checked[slot].Arrive();
  };
  unsigned n = 0;
#pragma unroll 1
  for (int i = 0; i < PartsOfCta(mapped); ++i) {
    const unsigned first = n;
    unsigned end = kUnknown;
#pragma unroll 1
    for (;; ++n) {
      if (n != end) {
        write_mask(n, i);
        if (smem.gathered[n % kSlots].is_last) end = n + 1;
      }
      if (n != first) check_v(n - 1);
      if (n == end) break;
    }
  }
}

// ---- a multiplying group ----

// s = q kT for this warp's rows, by the warp itself: slow, and needs nothing of the others.
DEVICE void ScoresByWarp(float (&s)[1][kN][4], const T* q_smem, const T* k_smem) {
  const int lane = threadIdx.x % 32;
  RowOperand<1, QTile, false> q;
  q.rows = q_smem + threadIdx.x / 32 % 4 * 16 * QTile::kRowPitch;
  Clear(s);
#pragma unroll 1
  for (int k = 0; k < CeilDiv(kHeadDim, 16); ++k) {
    uint32_t a[1][4], b[4];
    q.Read(k, a);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const int row = n * 8 + lane % 8 + lane / 16 * 8, column = k * 16 + lane / 8 % 2 * 8;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(SmemAddress(k_smem + KTile::Offset(row, column))));
      Mma(s[0][n], a[0], b[0], b[1]);
      Mma(s[0][n + 1], a[0], b[2], b[3]);
    }
  }
}

DEVICE void Multiply(Smem& smem, const SpattnCudaMappedFwdParams& mapped,
                     const SpattnCudaRule& rule, int group) {
  const SpattnProblem& problem = mapped.call.problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const float product_scale = problem.softmax_scale * kExpScale;
  const float scale_exp = kChangesScores ? 1 : product_scale;  // of what apply_rule leaves
  const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
  const auto q_row = [&](const Part& part, int r) {
    return q_rows.Row(part.index * kTileQ + group * kGroupRows + r);
  };
  const auto start_q = [&](const Part& part) {
    const int group_now = Opaque(group);
    LoadRows<kGroupRows, kHeadDim, kGroupThreads, false>(
        smem.q[group_now], RowSpan::Make(mapped.call.q, part.batch, part.head),
        [&](int r) { return q_row(part, r); }, group_now * kGroupThreads);
    CopyCommit();
  };
  const auto group_barrier = [&] { BarrierSync(kGroupBarrier + group, kGroupThreads); };

  RowOperand<1, QTile, false> q;
  float s_frag[1][kN][4], o_frag[1][kOut][4];
  uint32_t p_frag[kN / 2][1][4];
  OnlineSoftmax<1, kN, kOut> softmax;
  unsigned n = 0;
  bool is_masked = false, is_last = false, v_is_masked = false;  // tile n; tile n - 1
  bool masks_keys = false;                                       // tile n, and only them
  bool may_try;

  const auto wait_for_k = [&](unsigned n) {
    smem.listed[n % kSlots].Wait(SlotParity(n));
    smem.k_arrived[n % kStages].Wait(Parity(n));
    is_masked = smem.gathered[n % kSlots].is_masked, is_last = smem.gathered[n % kSlots].is_last;
    masks_keys = kMasksKeys && smem.gathered[n % kSlots].is_masked == kByKeys;
  };
  const auto wait_for_v = [&](unsigned n) {
    smem.v_arrived[n % kStages].Wait(Parity(n));
    if (v_is_masked) smem.v_checked[n % kSlots].Wait(SlotParity(n));
  };
  const auto queue_scores = [&](unsigned n) {
    q.group = SmemOperand::Make(smem.q[group]);
    MatmulABt<KTile>(s_frag, q, SmemOperand::Make(smem.k[n % kStages]), nullptr);
  };
  const auto queue_output = [&](unsigned n) {
    WgmmaPB<VTile>(o_frag, p_frag, SmemOperand::Make(smem.v[n % kStages]));
  };
  const auto release_k = [&](unsigned n) { smem.k_released[n % kStages].Arrive(); };
  // Found anew where it is wanted: in the loop over tiles every register counts.
  const auto part_of = [&](int i) { return PartOfCta(mapped, Opaque(i)); };
  const auto release_v = [&](unsigned n, int i) {
    if (v_is_masked && smem.has_nonfinite[n % kSlots]) {
      const Part part = part_of(i);
      const int* key_rows = smem.key_rows[n % kSlots];
      AddNonfinite<kTileQ, kTileKV, kHeadDimV>(
          o_frag, smem.mask[n % kSlots], RowSpan::Make(mapped.call.v, part.batch, part.kv_head),
          [&](int key) { return key_rows[key]; });
    }
    __syncwarp();
    if (lane == 0) smem.v_released[n % kStages].Arrive();
  };
  PanelRule<true, 1> panel_rule{rule,
                                RowMap::Make(problem.kv_len, problem.row_stride, problem.kv_len)};
  const auto columns_of = [&](unsigned n) {
    return [&smem, n, lane](int column) {
      return FragmentColumn{smem.gathered[n % kSlots].first[column * 8 / kPlanKV] + lane % 4 * 2,
                            column * 8 % kPlanKV};
    };
  };
  const auto apply_rule = [&](unsigned n) {
    if constexpr (kAlibiAlone) {
      smem.alibi[n % kSlots].Apply(s_frag, product_scale);
    } else if constexpr (kChangesScores) {
      panel_rule.ApplyToScores(s_frag, columns_of(n));
    }
  };
  const auto drop = [&](unsigned n) {
    if (kHasDropout) panel_rule.Drop(s_frag, smem.key_words[n % kSlots]);
  };
  // Whether s_frag has become exp(s - shift), scores unseen; if not, it is to be computed anew.
  // allows(column, j): whether the mask has the key.
  const auto try_update = [&](unsigned n, auto allows) {
    const Alibi& alibi = smem.alibi[kAlibiAlone ? n % kSlots : 0];
    int all_beyond = -1;  // negative as long as all logits are small
    const auto exponent = [&](float x, int, int h, int column, int j) {
      const float shift = softmax.shift[0][h];
      float exponent;
      if constexpr (kAlibiAlone) {
        exponent = alibi.Exponent(x, product_scale, shift, h, column, j);
      } else if constexpr (kCapAlone) {
        const float beyond = BeyondSmall(rule, x);
        all_beyond &= __float_as_int(beyond);
        exponent = fmaf(x, SumOfTerms(rule.cap_exponents, beyond), -shift);
      } else if constexpr (kBiasAlone) {
        exponent = fmaf(x, product_scale, panel_rule.edge - shift);
      } else {
        exponent = fmaf(x, scale_exp, -shift);
      }
      return allows(column, j) ? exponent : -kInf;
    };
    return softmax.TryUpdate(s_frag, exponent, [&] { return all_beyond < 0; });
  };
  // Turns s_frag into exp(s - shift). A warp that met with scores too large does not try again in its
  // part: it would compute too many of them twice.
  const auto exponentiate = [&](unsigned n) {
    if (kHasDropout || (is_masked && kMasksKeys)) {  // dropout's words are there
      smem.mask_written[n % kSlots].Wait(SlotParity(n));
    }
    if (!kJoinsRule) apply_rule(n);
    bool is_fit = true;  // for try_update
    if (kAlibiAlone) is_fit = smem.alibi[n % kSlots].is_beside;
    if constexpr (kBiasAlone) {
      is_fit = panel_rule.CaseOfDistances<kN>(columns_of(n)) == kBeyondReach;
    }
    // With a soft cap not under a mask: no bit may depend on whether logits of masked keys are small.
    const bool tries_keys = masks_keys && !kCapAlone;
    if (may_try && (!is_masked || tries_keys) && is_fit && softmax.HasShifts()) {
      if (tries_keys) {
        const KeyBits bits = KeyBits::Read(smem.key_bits[n % kSlots]);
        may_try = try_update(n, [&](int column, int j) { return bits.Allow(column, j); });
      } else {
        may_try = try_update(n, [](int, int) { return true; });
      }
      if (may_try) return drop(n);
      ScoresByWarp(s_frag, smem.q[group], smem.k[n % kStages]);
      if (!kJoinsRule) apply_rule(n);
    }
    if (kJoinsRule) apply_rule(n);
    if (masks_keys) {
      KeyBits::Read(smem.key_bits[n % kSlots]).Apply(s_frag);
    } else if (is_masked) {
      smem.mask_written[n % kSlots].Wait(SlotParity(n));
      ApplyMask<kTileQ>(s_frag, smem.mask[n % kSlots], 0);
    }
    softmax.Shift(s_frag, o_frag, scale_exp);
    softmax.Exponentiate(s_frag, scale_exp);
    drop(n);
  };

  start_q(part_of(0));
  if (group == kGroups - 1) BarrierArrive(kTurnBarrier, 2 * kGroupThreads);
#pragma unroll 1
  for (int i = 0; i < PartsOfCta(mapped); ++i) {
    CopyWait<0>();
    FenceForWgmma();
    group_barrier();
    Clear(o_frag);
    softmax.Init();
    may_try = true;
    if ((kChangesScores && !kAlibiAlone) || kHasDropout) {
      const Part part = part_of(i);
      panel_rule.Init(problem, part.batch, part.head,
                      [&](int, int h) { return q_row(part, warp * 16 + h * 8 + lane / 4); });
    }

    wait_for_k(n);
    queue_scores(n);
    MatmulWait<0>(s_frag);
    exponentiate(n);
    release_k(n);
    PackAllFragments(p_frag, s_frag);
    v_is_masked = is_masked;
    ++n;
#pragma unroll 1
    for (; !is_last; ++n) {
      wait_for_k(n);
      BarrierSync(kTurnBarrier + group, 2 * kGroupThreads);
      queue_scores(n);
      wait_for_v(n - 1);
      queue_output(n - 1);
      BarrierArrive(kTurnBarrier + (group + 1) % kGroups, 2 * kGroupThreads);
      MatmulWait<1>(s_frag);
      exponentiate(n);
      release_k(n);
      MatmulWait<0>(o_frag);
      softmax.Rescale(o_frag);
      release_v(n - 1, i);
      PackAllFragments(p_frag, s_frag);
      v_is_masked = is_masked;
    }
    group_barrier();  // all four warps have left q
    if (i + 1 < PartsOfCta(mapped)) start_q(part_of(i + 1));
    wait_for_v(n - 1);
    queue_output(n - 1);
    MatmulWait<0>(o_frag);
    release_v(n - 1, i);

    const Part part = part_of(i);
    float lse[1][2];
    softmax.Finish(o_frag, lse, kHasDropout ? rule.kept_times : 1);
    if (lane % 4 == 0) {
      float* to = mapped.call.lse +
                  (static_cast<int64_t>(part.batch) * problem.heads + part.head) * problem.q_len;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = q_row(part, warp * 16 + i * 8 + lane / 4);
        if (row >= 0) to[row] = lse[0][i];
      }
    }
    StoreRows<kHeadDimV>(
        o_frag, smem.o[Opaque(threadIdx.x / 32)],
        RowSpan::Make(mapped.call.o, part.batch, part.head), 0,
        [&](int r) { return q_row(part, warp * 16 + r); }, [](int) { return false; });
  }
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_fwd_sm90(const __grid_constant__ Given<SpattnCudaMappedFwdParams> given) {
  const SpattnCudaMappedFwdParams& mapped = CallOf(given);
  const SpattnCudaRule& rule = RuleOf(given);
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      smem.k_arrived[i].Init(1);
      smem.v_arrived[i].Init(1);
      smem.k_released[i].Init(kGroups * kGroupThreads);
      smem.v_released[i].Init(kGroups * 4);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      smem.listed[i].Init(32);
      smem.mask_written[i].Init(kMaskThreads);
      smem.v_checked[i].Init(kMaskThreads);
    }
    FenceMbarrierInit();
  }
  __syncthreads();
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  if (group == kGroups) {
    GiveRegisters<kCopyRegisters>();
    if (threadIdx.x / 32 % 4 == 0) {
      Copy(smem, mapped, rule);
    } else {
      Mask(smem, mapped, rule);
    }
  } else {
    TakeRegisters<kMathRegisters>();
    Multiply(smem, mapped, rule, group);
  }
}

}  // namespace spattn
