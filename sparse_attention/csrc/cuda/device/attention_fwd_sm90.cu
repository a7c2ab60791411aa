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
#include "cuda/device/attention_fwd_sm90_rule.cuh"

namespace spattn {

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
