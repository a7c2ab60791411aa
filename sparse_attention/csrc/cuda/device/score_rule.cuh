// score_rule.cuh — what stands between q kT and the softmax besides the plan (SpattnScoreRule), for all
// phases; the mathematics is in abi/core.h.
//
// Who may attend to whom (segments, mask) joins the bits that a passing tile has for PARTIAL blocks, so
// all that keeps masked keys out of sums holds for it; blocks of which no pair can attend are not in the
// lists any more, and those of which all may have no bits (score_rule_lists.cu). What changes a score or
// a weight is done to accumulators, in registers. Dropout's random words of a row are read from where
// score_rule_words.cu has put them.
//
// SPATTN_RULE, the SpattnRuleParts in use, is a macro: a kernel without a rule has nothing of this.
#pragma once
#include "abi/score_rule.h"
#include "cuda/device/device.cuh"

namespace spattn {

constexpr bool kHasSoftcap = SPATTN_RULE & SPATTN_RULE_SOFTCAP;
constexpr bool kHasAlibi = SPATTN_RULE & SPATTN_RULE_ALIBI;
constexpr bool kHasBias = SPATTN_RULE & SPATTN_RULE_BIAS;
constexpr bool kHasDropout = SPATTN_RULE & SPATTN_RULE_DROPOUT;
constexpr bool kChangesScores = kHasSoftcap || kHasAlibi || kHasBias;
constexpr bool kLooksAtDistances = kHasAlibi || kHasBias;

// What a kernel is given: a call, and where there is a rule that too.
#if SPATTN_RULE
template <class Call>
using Given = SpattnCudaRuled<Call>;
template <class Call>
DEVICE const Call& CallOf(const SpattnCudaRuled<Call>& given) {
  return given.call;
}
template <class Call>
DEVICE const SpattnCudaRule& RuleOf(const SpattnCudaRuled<Call>& given) {
  return given.rule;
}
#else
template <class Call>
using Given = Call;
template <class Call>
DEVICE const Call& CallOf(const Call& given) {
  return given;
}
template <class Call>
DEVICE SpattnCudaRule RuleOf(const Call&) {
  return {};
}
#endif

// ---- who may attend to whom ----

// The segment of a row that exists, negative: none.
DEVICE int QuerySegment(const SpattnCudaRule& rule, const SpattnProblem& problem, int batch,
                        int row) {
  return rule.q_segments ? __ldg(rule.q_segments + batch * problem.q_len + row) : 0;
}
DEVICE int KeySegment(const SpattnCudaRule& rule, const SpattnProblem& problem, int batch,
                      int row) {
  if (rule.kv_mask &&
      !__ldg(rule.kv_mask + batch * rule.kv_mask_strides[0] + row * rule.kv_mask_strides[1])) {
    return -1;
  }
  return rule.kv_segments ? __ldg(rule.kv_segments + batch * problem.kv_len + row) : 0;
}

// The highest bit of each byte that is not 0.
DEVICE uint32_t NonzeroBytes(uint32_t word) {
  return (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u;
}

// Takes out of a passing row's bits those that segments and mask do not allow. owned_row(r): the row
// of the tile's row r, or -1.
// kRun: so many neighbouring keys, of the passing or the owned side, are neighbouring rows.
template <bool kOwnsQueries, int kRun, typename OwnedRow>
struct Restriction {
  const SpattnCudaRule& rule;
  const SpattnProblem& problem;
  int batch, head;
  OwnedRow owned_row;

  // A whole warp calls it, each lane for a passing row; passing_row: -1, if there is none.
  template <int kWords>
  __forceinline__ void Apply(uint32_t (&words)[kWords], int passing_row, bool is_checked) const {
    if (!__any_sync(kFullWarp, is_checked)) return;
    const int lane = threadIdx.x % 32;
    if constexpr (kHasMask && kReadsVectors) {
      if (rule.mask_is_aligned) {
        ApplyVectors(words, passing_row);
        if (!kHasSegments) return;
      }
    }
    const bool reads_bytes = kHasMask && !(kReadsVectors && rule.mask_is_aligned);
    const int passing_segment = !kHasSegments || passing_row < 0 ? -1
                                : kOwnsQueries ? KeySegment(rule, problem, batch, passing_row)
                                               : QuerySegment(rule, problem, batch, passing_row);
    if (!kHasMask && rule.q_segments == nullptr) {  // all queries are in segment 0
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int owned = kOwnsQueries ? -1 : owned_row(w * 32 + lane);
        const bool is_allowed = kOwnsQueries
                                    ? passing_segment == 0
                                    : owned >= 0 && KeySegment(rule, problem, batch, owned) == 0;
        if (kOwnsQueries) words[w] = is_allowed ? words[w] : 0;
        if (!kOwnsQueries) words[w] &= __ballot_sync(kFullWarp, is_allowed);
      }
      return;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // This lane's owned row: it votes on each of the warp's passing rows.
      const int owned = owned_row(w * 32 + lane);
      const int segment = !kHasSegments || owned < 0 ? -1
                          : kOwnsQueries             ? QuerySegment(rule, problem, batch, owned)
                                                     : KeySegment(rule, problem, batch, owned);
      uint32_t allowed = kFullWarp;
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        bool is_allowed = true;
        if (kHasSegments) {
          const int other = __shfl_sync(kFullWarp, passing_segment, i);
          is_allowed = segment >= 0 && segment == other;
        }
        if (reads_bytes && !kOwnsQueries) {  // neighbouring lanes have neighbouring keys and bytes
          const int query = __shfl_sync(kFullWarp, passing_row, i);
          is_allowed &= MaskAllows(query, owned);
        }
        const uint32_t vote = __ballot_sync(kFullWarp, is_allowed);
        if (i == lane) allowed = vote;
      }
      if (reads_bytes && kOwnsQueries) {
        uint32_t bits = 0;
#pragma unroll 8
        for (int i = 0; i < 32; ++i) {
          const int query = __shfl_sync(kFullWarp, owned, i);
          bits |= static_cast<uint32_t>(MaskAllows(query, passing_row)) << i;
        }
        allowed &= bits;
      }
      words[w] &= allowed;
    }
  }

 private:
  static constexpr bool kReadsVectors = !SPATTN_ROW_STRIDED && kRun >= 16;

  __forceinline__ const uint8_t* MaskAt(int query, int key) const {
    return rule.mask + batch * rule.mask_strides[0] + head * rule.mask_strides[1] +
           query * rule.mask_strides[2] + key * rule.mask_strides[3];
  }
  __forceinline__ bool MaskAllows(int query, int key) const {
    return query >= 0 && key >= 0 && __ldg(MaskAt(query, key)) != 0;
  }

  // A bit for each of 16 keys of a query, from 16 bytes: the rows of an aligned mask are whole.
  __forceinline__ uint32_t MaskOf16(int query, int key) const {
    if (query < 0 || key < 0) return 0;
    const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(MaskAt(query, key)));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i == 0 ? bytes.x : i == 1 ? bytes.y : i == 2 ? bytes.z : bytes.w;
      bits |= ((NonzeroBytes(word) >> 7) * 0x10204080u >> 28) << (i * 4);  // side by side
    }
    return bits;
  }

  template <int kWords>
  __forceinline__ void ApplyVectors(uint32_t (&words)[kWords], int passing_row) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t allowed = 0;
      const int owned = owned_row(w * 32 + (kOwnsQueries ? lane : lane / 16 * 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kOwnsQueries) {  // lanes are queries, and vote on each of 16 keys
          const uint32_t bits = MaskOf16(owned, __shfl_sync(kFullWarp, passing_row, half * 16));
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const uint32_t vote = __ballot_sync(kFullWarp, bits >> i & 1);
            if (lane == half * 16 + i) allowed = vote;
          }
        } else {
          const int key = __shfl_sync(kFullWarp, owned, half * 16);
          allowed |= MaskOf16(passing_row, key) << (half * 16);
        }
      }
      words[w] &= allowed;
    }
  }
};

template <bool kOwnsQueries, int kRun, typename OwnedRow>
DEVICE Restriction<kOwnsQueries, kRun, OwnedRow> Restrict(const SpattnCudaRule& rule,
                                                          const SpattnProblem& problem, int batch,
                                                          int head, OwnedRow owned_row) {
  return {rule, problem, batch, head, owned_row};
}

// ---- scores and weights ----

// tanh with an absolute error below 2e-7, which is what a logit may have; where all is float32, CUDA's
// own. NaN stays NaN.
DEVICE float Tanh(float x) {
  if (kIsExact) return tanhf(x);
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * (2 * kLog2e)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
  return fmaf(-2, inverse, 1);
}

// The same of a small logit, as those far below their cap are, from the product x of a query and a key:
// x * SumOfTerms(terms, BeyondSmall(x)). It takes no special functions, of which the softmax has too
// many already, and what scales the product is in the terms. A logit is small where BeyondSmall, which
// is x^2 less that of the largest, is below 0.
DEVICE float BeyondSmall(const SpattnCudaRule& rule, float x) {
  return fmaf(x, x, -rule.cap_square);
}
DEVICE float SumOfTerms(const float (&terms)[4], float beyond) {
  return fmaf(fmaf(fmaf(terms[3], beyond, terms[2]), beyond, terms[1]), beyond, terms[0]);
}

// What a warp finds of a fragment before it computes its scores, so that most need no case by case.
enum FragmentCase {
  kAnyFragment = 0,
  kSmallLogits = 1,  // all are small: SumOfTerms
  kBeyondReach = 2,  // all distances are, on one side: they have one bias
  kWithinReach = 3,  // all are less: no index is clipped
  kEdgeInShift = 4,  // as kBeyondReach, and their bias has been taken from the shifts
};
template <FragmentCase kTheCase>
struct Case {
  static constexpr FragmentCase kValue = kTheCase;
};

// Two neighbouring columns of a fragment: their rows on the passing side, and their words for dropout.
struct ColumnPair {
  int row;             // of the run's first column for this lane; of queries plus q_offset
  float row_as_float;  // exact below 2^24
  int ahead[2];        // of the columns, from there on
  uint32_t multiplier[2], addend[2];  // of queries; of keys the multiplier alone
};

// The words of a head's rows: one of each key, two of each query.
DEVICE const uint32_t* KeyWords(const SpattnCudaRule& rule, const SpattnProblem& problem, int batch,
                                int head) {
  return rule.key_words + (static_cast<int64_t>(batch) * problem.heads + head) * rule.key_pitch;
}
DEVICE const uint32_t* QueryWords(const SpattnCudaRule& rule, const SpattnProblem& problem,
                                  int batch, int head) {
  return rule.query_words +
         (static_cast<int64_t>(batch) * problem.heads + head) * rule.query_pitch * 2;
}

// Brings the words of a passing tile of keys; row_of(r): a row or -1. Whole warps.
template <int kRows, int kThreads, typename RowOf>
DEVICE void LoadKeyWords(uint32_t* to, const SpattnCudaRule& rule, const SpattnProblem& problem,
                         int batch, int head, RowOf row_of) {
  const uint32_t* from = KeyWords(rule, problem, batch, head);
  const unsigned thread = Opaque(threadIdx.x);
#pragma unroll
  for (int i = 0; i < CeilDiv(kRows, kThreads); ++i) {
    const unsigned r = thread + i * kThreads;
    if (r >= kRows) break;
    const int row = row_of(r);
    CopyAsync<4>(to + r, from + Max(row, 0), row >= 0);
  }
}

// The rule on fragments whose rows are a warp's and whose columns pass; one of both are queries.
template <bool kOwnsQueries, int kM>
struct PanelRule {
  const SpattnCudaRule& rule;
  RowMap passing_rows;
  float scale, cap, slope;  // cap and slope in the exponents' base
  const float* bias;        // [2 * reach - 1]
  int rows[kM][2];          // of the warp's; of queries with q_offset
  float rows_as_floats[kM][2];
  float edge;  // the bias of Case<kBeyondReach>, in the exponents' base
  uint32_t multiplier[kM][2], addend[kM][2];

  // Words of a passing row that dropout needs in shared memory.
  static constexpr int kWords = !kHasDropout ? 0 : kOwnsQueries ? 1 : 2;

  // owned_row(m, h): the row of fragment m, half h of this lane, or -1.
  template <typename OwnedRow>
  __forceinline__ void Init(const SpattnProblem& problem, int batch, int head, OwnedRow owned_row) {
    scale = problem.softmax_scale * (kHasSoftcap ? 1 / rule.logit_softcap : kExpScale);
    cap = rule.logit_softcap * kExpScale;
    if (kHasAlibi) slope = __ldg(rule.alibi_slopes + head) * kExpScale;
    if (kHasBias) {
      const int64_t at = rule.bias_heads == 1 ? 0 : head;
      bias = rule.relative_bias + at * (2 * rule.bias_reach - 1);
    }
    const uint32_t* keys = KeyWords(rule, problem, batch, head);
    const uint32_t* queries = QueryWords(rule, problem, batch, head);
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2, row = Max(owned_row(m, h), 0);
      rows[m][h] = row + (kOwnsQueries ? rule.q_offset : 0);
      rows_as_floats[m][h] = static_cast<float>(rows[m][h]);
      if (!kHasDropout) continue;
      multiplier[m][h] = __ldg(kOwnsQueries ? queries + row * 2 : keys + row);
      if (kOwnsQueries) addend[m][h] = __ldg(queries + row * 2 + 1);
    }
  }

  // Two columns of fragment n. words: those of the sub-tile's rows, in shared memory. column_of(n):
  // where this lane's first column of it lies; it is not asked where nothing depends on distances.
  template <typename ColumnOf>
  __forceinline__ ColumnPair Columns(ColumnOf column_of, const uint32_t* words, int n) const {
    ColumnPair pair = PlacedColumns(column_of, n);
    ReadWords(&pair, words, n);
    return pair;
  }

  // The same without words; of no use where no block is there.
  template <typename ColumnOf>
  __forceinline__ ColumnPair PlacedColumns(ColumnOf column_of, int n) const {
    ColumnPair pair = {};
    if constexpr (kLooksAtDistances) {
      const FragmentColumn column = column_of(n);
      const int first = Max(column.run, 0) + column.within, end = passing_rows.positions - 1;
      const int row = passing_rows.ExistingRow(Min(first, end));
      const int next_row = passing_rows.ExistingRow(Min(first + 1, end));
      pair.row = (SPATTN_ROW_STRIDED ? row : column.run) + (kOwnsQueries ? 0 : rule.q_offset);
      pair.row_as_float = static_cast<float>(pair.row);
      pair.ahead[0] = SPATTN_ROW_STRIDED ? 0 : column.within;
      pair.ahead[1] = SPATTN_ROW_STRIDED ? next_row - row : column.within + 1;
    }
    return pair;
  }

  __forceinline__ void ReadWords(ColumnPair* pair, const uint32_t* words, int n) const {
    if (!kHasDropout) return;
    words += (n * 8 + threadIdx.x % 4 * 2) * kWords;
    if (kOwnsQueries) {
      const uint2 at = *reinterpret_cast<const uint2*>(words);
      pair->multiplier[0] = at.x, pair->multiplier[1] = at.y;
    } else {
      const uint4 at = *reinterpret_cast<const uint4*>(words);
      pair->multiplier[0] = at.x, pair->addend[0] = at.y;
      pair->multiplier[1] = at.z, pair->addend[1] = at.w;
    }
  }

  // Whether the distances of a warp's fragment are beyond the reach, which sets `edge`, or within.
  template <int kN, typename ColumnOf>
  __forceinline__ FragmentCase CaseOfDistances(ColumnOf column_of) {
    int first = 0x7fffffff, last = -first, first_row = first, last_row = last;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const ColumnPair columns = PlacedColumns(column_of, n);
      first = Min(first, columns.row + columns.ahead[0]);
      last = Max(last, columns.row + columns.ahead[1]);
    }
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      first_row = Min(first_row, rows[i / 2][i % 2]), last_row = Max(last_row, rows[i / 2][i % 2]);
    }
    const int least = kOwnsQueries ? first_row - last : first - last_row;
    const int most = kOwnsQueries ? last_row - first : last - first_row;
    const int reach = rule.bias_reach - 1;
    if (__all_sync(kFullWarp, least >= reach) || __all_sync(kFullWarp, most <= -reach)) {
      edge = __ldg(bias + (least >= reach ? 2 * reach : 0)) * kExpScale;
      return kBeyondReach;
    }
    return __all_sync(kFullWarp, least > -reach && most < reach) ? kWithinReach : kAnyFragment;
  }

  // Calls work(Case<...>) with what all of a warp's fragment is.
  template <int kN, typename ColumnOf, typename Work>
  __forceinline__ void ByCase(const float (&s)[kM][kN][4], ColumnOf column_of, Work work) {
    if constexpr (kHasSoftcap && !kIsExact) {
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kM * kN * 4; ++i) {
        largest = fmaxf(largest, fabsf(s[i / (kN * 4)][i / 4 % kN][i % 4]));
      }
      if (__all_sync(kFullWarp, BeyondSmall(rule, largest) < 0)) {
        work(Case<kSmallLogits>{});
      } else {
        work(Case<kAnyFragment>{});
      }
    } else if constexpr (kHasBias && !kHasSoftcap && !SPATTN_ROW_STRIDED) {
      const FragmentCase found = CaseOfDistances<kN>(column_of);
      if (found == kBeyondReach) {
        work(Case<kBeyondReach>{});
      } else if (found == kWithinReach) {
        work(Case<kWithinReach>{});
      } else {
        work(Case<kAnyFragment>{});
      }
    } else {
      work(Case<kAnyFragment>{});
    }
  }

  // x: the products <q, k> of two columns, columns n of s; with a rule for them, scores in the exponents'
  // base. cap_slopes: the derivatives of the soft cap.
  template <int kN, FragmentCase kCase>
  __forceinline__ void Scores(Case<kCase>, const float (&s)[kM][kN][4], int n,
                              const ColumnPair& columns, float (&x)[kM][4],
                              float (&cap_slopes)[kM][4]) const {
#pragma unroll
    for (int i = 0; i < kM * 4; ++i) x[i / 4][i % 4] = s[i / 4][n][i % 4];
#pragma unroll
    for (int i = 0; kChangesScores && i < kM * 4; ++i) {
      const int m = i / 4, h = i / 2 % 2, j = i % 2;
      float& at = x[m][i % 4];
      if (kHasSoftcap) {
        // Each by itself, as if its fragment were small: no score may depend on another's.
        const float beyond = kIsExact ? 0 : BeyondSmall(rule, at);
        const bool is_small = kCase == kSmallLogits || beyond < 0;
        // Both are computed: a branch would read the terms anew for each score.
        const float small = at * SumOfTerms(rule.cap_terms, beyond);
        at = is_small ? small : Tanh(at * scale);
        cap_slopes[m][i % 4] = fmaf(-at, at, 1);
        at *= cap;
      } else {
        at *= scale;
      }
      if (kHasAlibi) {
        const float ahead =
            rows_as_floats[m][h] - columns.row_as_float - static_cast<float>(columns.ahead[j]);
        at = fmaf(-slope, fabsf(ahead), at);
      }
      if (kHasBias && kCase == kBeyondReach) {
        at += edge;
      } else if (kHasBias && kCase != kEdgeInShift) {
        const int reach = rule.bias_reach - 1, bias_at = Distance(m, h, columns, j) + reach;
        const int clipped = kCase == kWithinReach ? bias_at : Max(0, Min(bias_at, 2 * reach));
        at = fmaf(__ldg(bias + clipped), kExpScale, at);
      }
    }
  }

  // i - j of a pair.
  __forceinline__ int Distance(int m, int h, const ColumnPair& columns, int j) const {
    const int ahead = rows[m][h] - columns.row;
    return kOwnsQueries ? ahead - columns.ahead[j] : columns.ahead[j] - ahead;
  }

  // Whether dropout keeps a weight.
  __forceinline__ bool Keeps(int m, int h, const ColumnPair& columns, int j) const {
    const uint32_t bits = kOwnsQueries
                              ? multiplier[m][h] * columns.multiplier[j] + addend[m][h]
                              : columns.multiplier[j] * multiplier[m][h] + columns.addend[j];
    return bits >= rule.dropout_threshold;
  }

  // Products become scores. column_of(n): where this lane's first column of fragment n lies.
  template <int kN, typename ColumnOf>
  __forceinline__ void ApplyToScores(float (&s)[kM][kN][4], ColumnOf column_of) {
    ByCase(s, column_of, [&](auto the_case) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        float x[kM][4], cap_slopes[kM][4];
        Scores(the_case, s, n, PlacedColumns(column_of, n), x, cap_slopes);
#pragma unroll
        for (int i = 0; i < kM * 4; ++i) s[i / 4][n][i % 4] = x[i / 4][i % 4];
      }
    });
  }

  // Weights that dropout does not keep become 0; the others are to be multiplied with kept_times.
  template <int kN>
  __forceinline__ void Drop(float (&p)[kM][kN][4], const uint32_t* words) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      ColumnPair columns = {};
      ReadWords(&columns, words, n);
#pragma unroll
      for (int i = 0; i < kM * 4; ++i) {
        if (!Keeps(i / 4, i / 2 % 2, columns, i % 2)) p[i / 4][n][i % 4] = 0;
      }
    }
  }
};

}  // namespace spattn
