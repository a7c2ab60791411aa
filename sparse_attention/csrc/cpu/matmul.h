// matmul.h — the one matrix product of the CPU kernels: a register tile of rows x kPanel.
//
//   acc[r][n] += sum_k a(r, k) * b[k][n]        r < kRows, n < kPanel
//
// b is a panel of kPanel = 2 vectors; a is read by broadcast, so it is never packed: rows that lie
// k-contiguous (kRowMajor) or r-contiguous (kColMajor) both work in place. Every product of forward
// and backward has this form, with queries or the head dimension along the panel:
//
//   s^T  = K   q^T     rows = keys   k = head_dim     panel = queries
//   o^T += v^T p^T     rows = dims   k = keys         panel = queries
//   dp^T = V   do^T    rows = keys   k = head_dim_v   panel = queries
//   dq^T += k^T ds^T   rows = dims   k = keys         panel = queries
//   dv  += p^T do      rows = keys   k = queries      panel = head_dim_v
//   dk  += ds^T q      rows = keys   k = queries      panel = head_dim
//
// k counts words of one or two terms (terms.h); accumulators are float32 always.
//
// Registers: 2 kRows accumulators + 2 of b + 1 broadcast: 15 of 16 with AVX2 (kRows 6), 27 of 32 with
// AVX-512 (kRows 12). FMA has a latency of 4 at 2 a cycle, so 8 accumulators are the least.
#ifndef SPARSE_ATTENTION_CPU_MATMUL_H_
#define SPARSE_ATTENTION_CPU_MATMUL_H_

#include "cpu/terms.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;  // queries in a panel: 8, 16 or 32
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif

enum ALayout { kRowMajor, kColMajor };  // a(r, k) at a[r * lda + k], or at a[k * lda + r]

template <int kRows>
struct RegisterTile {
  Vec v[kRows][kPanelVecs];
};

template <int kRows>
SPATTN_INLINE RegisterTile<kRows> ZeroTile() {
  RegisterTile<kRows> acc;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) acc.v[r][n] = Vec{};
  }
  return acc;
}

// A register tile from and to memory [kRows, kPanel].
template <int kRows>
SPATTN_INLINE RegisterTile<kRows> LoadTile(const float* from) {
  RegisterTile<kRows> acc;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) acc.v[r][n] = Load(from + r * kPanel + n * kLanes);
  }
  return acc;
}

template <int kRows>
SPATTN_INLINE void StoreTile(const RegisterTile<kRows>& acc, float* to) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) Store(to + r * kPanel + n * kLanes, acc.v[r][n]);
  }
}

template <int kRows>
SPATTN_INLINE void AddTile(const RegisterTile<kRows>& from, RegisterTile<kRows>& to) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) to.v[r][n] += from.v[r][n];
  }
}

template <class Terms, ALayout kLayout, int kRows>
SPATTN_INLINE void MultiplyAdd(RegisterTile<kRows>& acc, const float* a, int64_t lda,
                               const float* b, int64_t ldb, int k_size) {
#pragma GCC unroll 1
  for (int k = 0; k < k_size; ++k) {
    const Vec b0 = Load(b), b1 = Load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec a_r = Terms::BroadcastWord(kLayout == kRowMajor ? a + r * lda : a + r);
      acc.v[r][0] = Terms::MultiplyAdd(a_r, b0, acc.v[r][0]);
      acc.v[r][1] = Terms::MultiplyAdd(a_r, b1, acc.v[r][1]);
    }
    a += kLayout == kRowMajor ? 1 : lda;
    b += ldb;
  }
}

// Words that are summed one after another; longer sums are sums of such sums, which halves the rounding
// error at head_dim 256 for about 3 % of the time.
constexpr int kWordsASum = 64;

// The products of rows a [kRows, k_size] with a panel b [k_size, kPanel].
template <class Terms, int kRows>
SPATTN_INLINE RegisterTile<kRows> RowProducts(const float* a, int64_t lda, const float* b,
                                              int k_size) {
  auto acc = ZeroTile<kRows>();
  MultiplyAdd<Terms, kRowMajor>(acc, a, lda, b, kPanel, k_size < kWordsASum ? k_size : kWordsASum);
  for (int k = kWordsASum; k < k_size; k += kWordsASum) {
    const int words = k_size - k < kWordsASum ? k_size - k : kWordsASum;
    auto part = ZeroTile<kRows>();
    MultiplyAdd<Terms, kRowMajor>(part, a + k, lda, b + k * kPanel, kPanel, words);
    AddTile(part, acc);
  }
  return acc;
}

template <int kHeight>
struct RowCount {  // a tile's height as a type, for the callable of ForRowTiles
  static constexpr int kRows = kHeight;
};

// Calls body(first_row, RowCount<kRows>()) over [0, rows): the tallest tiles first, then what is left.
template <int kRows = kMaxRows, class Body>
SPATTN_INLINE void ForRowTiles(int rows, const Body& body, int first = 0) {
  for (; first + kRows <= rows; first += kRows) body(first, RowCount<kRows>());
  constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
  if constexpr (kNext > 0) {
    if (first < rows) ForRowTiles<kNext>(rows, body, first);
  }
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_MATMUL_H_
