// terms.h — what a 32-bit word of a tile holds: a float, or a pair of bfloat16.
//
// Tiles are arrays of words, and a product multiplies word by word along k and adds. With Floats a word
// is one term of the sum. With Bfloat16Pairs it is two terms that lie side by side along k: twice the
// products an instruction, for CPUs with dpbf16ps. Both offer the same functions, and the kernels are
// templates over them. How words are made depends on what the sum runs over:
//   rows      [n, dim / kTerms]   along dim     s = k q, dp = v do
//   columns   [n / kTerms, dim]   along n       o += v p, dq += k ds, dv += p do, dk += ds q
// With Floats they are the same array. Words travel as float*, but never through float arithmetic, which
// would flush a pair that looks like a denormal.
#ifndef SPARSE_ATTENTION_CPU_TERMS_H_
#define SPARSE_ATTENTION_CPU_TERMS_H_

#include "cpu/rows.h"

namespace spattn {
namespace SPATTN_ISA {

struct Floats {
  static constexpr int kTerms = 1;

  static SPATTN_INLINE Vec BroadcastWord(const float* word) { return Broadcast(*word); }
  static SPATTN_INLINE Vec MultiplyAdd(Vec a, Vec b, Vec acc) { return acc + a * b; }

  // Loads `dim` terms of a row of the caller's tensor.
  static SPATTN_INLINE void LoadRow(const char* from, int32_t dtype, int dim, float* to) {
    spattn::SPATTN_ISA::LoadRow(from, dtype, dim, to);
  }
  static SPATTN_INLINE bool RowIsFinite(const float* row, int dim) {
    return spattn::SPATTN_ISA::RowIsFinite(row, dim);
  }
  // Loads 2 kLanes terms of a row.
  static SPATTN_INLINE void StoreRow(Vec first, Vec second, float* to) {
    Store(to, first);
    Store(to + kLanes, second);
  }

  // Makes kLanes words of columns from kTerms rows.
  static SPATTN_INLINE Vec Column(const Vec* rows) { return rows[0]; }
  // The columns of rows [n, ld]; `to` is where there is space for them.
  static SPATTN_INLINE float* Columns(float* rows, int, int64_t, float*) { return rows; }

  static float TermOfRow(const float* row, int i) { return row[i]; }
  static float TermOfColumns(const float* columns, int64_t ld, int row, int i) {
    return columns[row * ld + i];
  }
};

struct Bfloat16Pairs {
  static constexpr int kTerms = 2;

  static SPATTN_INLINE Vec BroadcastWord(const float* word) {
    return (Vec)(BitVec{} + LoadAs<uint32_t>(word));
  }

  // Where the CPU lacks the instruction, which happens in tests: the same terms, each product rounded.
  static SPATTN_INLINE Vec MultiplyAdd(Vec a, Vec b, Vec acc) {
#if defined(SPATTN_HAS_DPBF16)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (Vec)((BitVec)a & 0xffff0000u) * (Vec)((BitVec)b & 0xffff0000u);
    return acc + (Vec)((BitVec)a << 16) * (Vec)((BitVec)b << 16);
#endif
  }

  static SPATTN_INLINE void LoadRow(const char* from, int32_t, int dim, float* to) {
    for (int d = 0; d < dim; d += 8) StoreAs(to + d / 2, LoadAs<HalfVec8>(from + 2 * d));
  }
  static SPATTN_INLINE bool RowIsFinite(const float* row, int dim) {
    HalfVec8 special{};
    for (int d = 0; d < dim; d += 8) {
      special |= (HalfVec8)((LoadAs<HalfVec8>(row + d / 2) & 0x7f80) == 0x7f80);
    }
    return (LoadAs<uint64_t>(&special) | LoadAs<uint64_t>((const char*)&special + 8)) == 0;
  }
  static SPATTN_INLINE void StoreRow(Vec first, Vec second, float* to) {
#if defined(SPATTN_HAS_DPBF16)
    StoreAs(to, _mm512_cvtne2ps_pbh(second, first));
#else
    StoreAs(to, ToBfloat16(first));
    StoreAs(to + kLanes / 2, ToBfloat16(second));
#endif
  }

  static SPATTN_INLINE Vec Column(const Vec* rows) {
    const BitVec low = __builtin_convertvector(ToBfloat16(rows[0]), BitVec);
    const BitVec high = __builtin_convertvector(ToBfloat16(rows[1]), BitVec);
    return (Vec)(low | high << 16);
  }
  static SPATTN_INLINE float* Columns(float* rows, int n, int64_t ld, float* to) {
    for (int i = 0; i < n; i += 2) {
      const float* first = rows + i * ld;
      float* column = to + i * ld;
      for (int64_t word = 0; word < ld; word += 4) {
        const HalfVec8 a = LoadAs<HalfVec8>(first + word);
        const HalfVec8 b = i + 1 < n ? LoadAs<HalfVec8>(first + ld + word) : HalfVec8{};
        StoreAs(column + 2 * word, SPATTN_SHUFFLE8(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        StoreAs(column + 2 * word + 4, SPATTN_SHUFFLE8(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
      }
    }
    return to;
  }

  static float TermOfRow(const float* row, int i) { return Term(row + i / 2, i % 2); }
  static float TermOfColumns(const float* columns, int64_t ld, int row, int i) {
    return Term(columns + row / 2 * ld + i, row % 2);
  }

 private:
  static float Term(const float* word, int which) {
    const uint32_t bits = LoadAs<uint32_t>(word);
    const uint32_t term = which ? bits & 0xffff0000u : bits << 16;
    return LoadAs<float>(&term);
  }
};

#if defined(SPATTN_HAS_DPBF16) || defined(SPATTN_PAIRS_WITHOUT_DPBF16)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Calls body with the kind of terms in which tensors of this dtype are multiplied.
template <class Body>
SPATTN_INLINE void WithTermsOf(int32_t dtype, const Body& body) {
  if constexpr (kHasPairs) {
    if (dtype == SPATTN_BFLOAT16) return body(Bfloat16Pairs());
  }
  body(Floats());
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_TERMS_H_
