// attention_fwd_sm90_rule.cuh — ALiBi and masks of keys of a tile in attention_fwd_sm90.cu.
#pragma once
#include "cuda/device/attention_fwd_sm90.cuh"

namespace spattn {

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

}  // namespace spattn
