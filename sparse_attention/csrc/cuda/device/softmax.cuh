// softmax.cuh — what the forward kernels do to scores between their two products.
#pragma once
#include "cuda/device/matmul.cuh"

namespace spattn {

// Scores of pairs that are not allowed become -inf, whatever they were.
template <int kTileRows, int kM, int kN>
DEVICE void ApplyMask(float (&s)[kM][kN][4], const uint32_t* mask_smem, int first_key) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t allowed = FragmentMask<kTileRows, kM * 16>(mask_smem, first_key, n, j);
#pragma unroll
      for (int i = 0; i < kM * 2; ++i) {
        if (!(allowed >> (i * 8) & 1)) s[i / 2][n][i % 2 * 2 + j] = -kInf;
      }
    }
  }
}

struct Always {
  constexpr bool operator()() const { return true; }
};

template <int kM, int kN, int kOut>
struct OnlineSoftmax {
  // The state of a row, scaled as exponents are (scale_exp). A shift is rounded once and is the same in
  // all places, because it must cancel to the last bit where exponentials of a row meet.
  float shift[kM][2];    // subtracted; 0 as long as there was no key
  float limit[kM][2];    // the largest score that the shift is good for; -inf: any key is more
  float row_sum[kM][2];  // this lane's share
  // With wgmma `Shift` leaves o to `Rescale`: products into it may be under way, for which the warps of
  // a warpgroup must all wait or none, and each shifts by its own rows.
  float factor[kM][2];
  bool has_shifted;  // any row of the warp

  // exp(score - shift) may be up to 2^8: no type here overflows, 16 bits are as exact there, and
  // once a row has seen some keys its shift hardly moves. Exact float32 takes the maximum itself.
  static constexpr float kSlack = kIsExact ? 0 : 8;

  __forceinline__ void Init() {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      shift[i / 2][i % 2] = row_sum[i / 2][i % 2] = 0;
      limit[i / 2][i % 2] = -kInf;
    }
    has_shifted = false;
  }

  // Raises the shifts of rows with scores over their limits. Then come, in any order, `Exponentiate` and,
  // once all products into o are complete, `Rescale`.
  __forceinline__ void Shift(const float (&s)[kM][kN][4], float (&o)[kM][kOut][4],
                             float scale_exp) {
    float peaks[kM][2];
    bool is_over = false;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float peak = s[m][0][h * 2], other_peak = s[m][0][h * 2 + 1];  // two chains: half the latency
#pragma unroll
      for (int n = 1; n < kN; ++n) {
        peak = fmaxf(peak, s[m][n][h * 2]);
        other_peak = fmaxf(other_peak, s[m][n][h * 2 + 1]);
      }
      peaks[m][h] = __fmul_rn(fmaxf(peak, other_peak), scale_exp);
      is_over |= peaks[m][h] > limit[m][h];
    }
    has_shifted = __any_sync(kFullWarp, is_over);
    if (has_shifted) ShiftTo(peaks, o);
  }

  // Turns scores into exp(s - shift).
  __forceinline__ void Exponentiate(float (&s)[kM][kN][4], float scale_exp) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      row_sum[m][h] = SumExp(s, m, h, row_sum[m][h], [&](float x, int m, int h, int, int) {
        return fmaf(x, scale_exp, -shift[m][h]);
      });
    }
  }

  // Multiplies o as `Shift` has shifted.
  __forceinline__ void Rescale(float (&o)[kM][kOut][4]) const {
    if (!kHasWgmma || !has_shifted) return;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) RescaleRow(o, i / 2, i % 2, factor[i / 2][i % 2]);
  }

  // Whether TryUpdate may be called: all rows of the warp have had keys.
  __forceinline__ bool HasShifts() const {
    bool has_shifts = true;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) has_shifts &= limit[i / 2][i % 2] > -kInf;
    return __all_sync(kFullWarp, has_shifts);
  }

  // Exponentiate without a look at the scores: the shifts stay. False where the sums show that a score was
  // too large for its row's, more than 2^13 of exp(s - shift): then the scores are lost, and nothing
  // else has changed. Scores seldom outgrow those of the first keys, and their maximum is a fifth of
  // all instructions here, for which the exponentials would wait.
  __forceinline__ bool TryUpdate(float (&s)[kM][kN][4], float scale_exp) {
    return TryUpdate(
        s, [&](float x, int m, int h, int, int) { return fmaf(x, scale_exp, -shift[m][h]); });
  }

  // The same where exponent(x, m, h, n, j) makes s - shift of a product x, from column j of fragment n.
  // Also false where are_right(), asked afterwards, says that not all of them were right.
  template <typename Exponent, typename AreRight = Always>
  __forceinline__ bool TryUpdate(float (&s)[kM][kN][4], Exponent exponent,
                                 AreRight are_right = {}) {
    constexpr float kLargestSum = 8192;
    has_shifted = false;
    float tile_sum[kM][2];
    bool is_over = false;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      tile_sum[m][h] = SumExp(s, m, h, 0, exponent);
      is_over |= tile_sum[m][h] > kLargestSum;
    }
    is_over |= !are_right();
    if (__any_sync(kFullWarp, is_over)) return false;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) row_sum[i / 2][i % 2] += tile_sum[i / 2][i % 2];
    return true;
  }

  // Turns a row's scores into exp(s - shift); returns their sum and `sum`.
  template <typename Exponent>
  __forceinline__ float SumExp(float (&s)[kM][kN][4], int m, int h, float sum, Exponent exponent) {
    float sums[2] = {sum, 0};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float p = Exp(exponent(s[m][n][h * 2 + j], m, h, n, j));
        s[m][n][h * 2 + j] = p;
        sums[j] += p;
      }
    }
    return sums[0] + sums[1];
  }

  // Shifts the rows whose limit is exceeded, and those alone: no row may notice another's keys.
  // peaks: maxima over this lane's columns.
  __forceinline__ void ShiftTo(const float (&peaks)[kM][2], float (&o)[kM][kOut][4]) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float peak = peaks[m][h];
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2));
      factor[m][h] = 1;
      if (!(peak > limit[m][h])) continue;
      const float correction = limit[m][h] == -kInf ? 1 : Exp(shift[m][h] - peak);
      shift[m][h] = peak;
      limit[m][h] = peak + kSlack;
      row_sum[m][h] *= correction;
      factor[m][h] = correction;
      if (!kHasWgmma) RescaleRow(o, m, h, correction);
    }
  }

  static __forceinline__ void RescaleRow(float (&o)[kM][kOut][4], int m, int h, float factor) {
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      o[m][n][h * 2] *= factor;
      o[m][n][h * 2 + 1] *= factor;
    }
  }

  // Divides o by the sums, and multiplies it with o_times; returns lse of this lane's rows in nats.
  __forceinline__ void Finish(float (&o)[kM][kOut][4], float (&lse)[kM][2], float o_times) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float sum = row_sum[m][h];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      // One rounding, not two, for float32: delta = <do, o> cancels against dp in the backward.
      const float divisor = sum == 0 ? 1 : sum, inverse = o_times / divisor;
      lse[m][h] = sum == 0 ? -kInf : LogSumExp(shift[m][h], sum);
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
#pragma unroll
        for (int j = h * 2; j < h * 2 + 2; ++j) {
          o[m][n][j] = kIsExact ? o[m][n][j] * o_times / divisor : o[m][n][j] * inverse;
        }
      }
    }
  }

  // log(sum * exp(shift)). The exact backward takes exp of it again and would double an error of
  // one unit in the last place.
  DEVICE float LogSumExp(float shift, float sum) {
    if (kIsExact) return static_cast<float>(shift + log(double(sum)));
    return fmaf(shift, 1 / kExpScale, logf(sum));
  }
};

// Gives the non-finite v that were zeroed in a PARTIAL tile to the rows that attend to them: with p
// > 0, p * Inf is Inf and p * NaN is NaN, so adding them once is enough. Rare, hence not fast.
template <int kTileRows, int kTileKV, int kHeadDimV, int kM, int kOut, typename KeyRow>
DEVICE void AddNonfinite(float (&o)[kM][kOut][4], const uint32_t* mask_smem, const RowSpan& v,
                         KeyRow key_row) {
#pragma unroll 1
  for (int key = 0; key < kTileKV; ++key) {
    const int row = key_row(key);
    const int lane = threadIdx.x % 32;
    const uint32_t allowed = LaneMask<kTileRows, kM * 16>(mask_smem, key);
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j;
        if (row < 0 || column >= kHeadDimV) continue;
        const float value = ToFloat(v.Row(row)[column]);
        if (fabsf(value) < kInf) continue;
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
          if (allowed >> (i * 8) & 1) o[i / 2][n][i % 2 * 2 + j] += value;
        }
      }
    }
  }
}

}  // namespace spattn
