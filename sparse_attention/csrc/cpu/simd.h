// simd.h — the vector type of the instruction set this file is compiled for.
//
// GCC's and Clang's vector extensions do the arithmetic, so the kernels are written once: 16 bytes
// on any machine, 32 with AVX2, 64 with AVX-512. Intrinsics stand only where the extensions have no
// word for the instruction. Include no C++ library header here or in what includes this file: an
// inline function compiled for AVX-512 could be the copy that the linker keeps for everybody.
#ifndef SPARSE_ATTENTION_CPU_SIMD_H_
#define SPARSE_ATTENTION_CPU_SIMD_H_

#include <stdint.h>
#include <string.h>
#if defined(SPATTN_AVX512_BF16) && __GNUC__ >= 10 && !defined(__clang__)
#pragma GCC target("avx512bf16")  // no flag: an older compiler would refuse it
#define SPATTN_HAS_DPBF16
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPATTN_INLINE inline __attribute__((always_inline))
// Keeps a stage that holds a product out of line: inlined into one large function, GCC 12 keeps the
// accumulators in memory (backward of `all`: 372 ms instead of 300).
#define SPATTN_STAGE inline __attribute__((noinline))

namespace spattn {
namespace SPATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int kLanes = kVecBytes / 4;

typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVecBytes)));
typedef uint32_t BitVec __attribute__((vector_size(kVecBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVecBytes / 2)));  // kLanes 16-bit elements
typedef float Vec4 __attribute__((vector_size(16)));
constexpr int kRowLanes = kLanes < 8 ? kLanes : 8;  // divides every head dim
typedef float RowVec __attribute__((vector_size(4 * kRowLanes)));
typedef uint16_t HalfVec8 __attribute__((vector_size(16)));
typedef int32_t IntVec4 __attribute__((vector_size(16)));

constexpr float kInf = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

// ---- memory; no alignment is asked for ----

template <class V>
SPATTN_INLINE V LoadAs(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
SPATTN_INLINE void StoreAs(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}
SPATTN_INLINE Vec Load(const float* p) { return LoadAs<Vec>(p); }
SPATTN_INLINE void Store(float* p, Vec v) { StoreAs(p, v); }
SPATTN_INLINE void Zero(float* p, int64_t count) { memset(p, 0, 4 * static_cast<size_t>(count)); }
SPATTN_INLINE Vec Broadcast(float x) { return x - Vec{}; }  // x - 0: exact for every x, -0 too

// ---- lanes ----

SPATTN_INLINE Vec Select(IntVec claim, Vec yes, Vec no) { return claim ? yes : no; }

// Returns b where either is NaN, as x86's maxps does.
SPATTN_INLINE Vec Max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return Select(a > b, a, b);
#endif
}

// All ones in lane i where bit i of `bits` is set.
SPATTN_INLINE IntVec LanesOfBits(uint32_t bits) {
  BitVec lane_bit{};
  for (int i = 0; i < kLanes; ++i) lane_bit[i] = 1u << i;
  return ((BitVec{} + bits) & lane_bit) != BitVec{};
}

// 2^x for x <= 128, relative error below 2e-7; 0 below 2^-126; NaN stays NaN.
//
// x = n + f with n the nearest integer, |f| <= 1/2: adding 1.5 * 2^23 leaves n in the low bits of the
// sum. 2^f is a polynomial of degree 5 with the constant 1, so that 2^0 is 1, and otherwise minimax in
// relative error (1.1e-7 before rounding).
SPATTN_INLINE Vec Exp2(Vec x) {
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);
  Vec y = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  y = y * f + 0x1.c6b752p-5f;
  y = y * f + 0x1.ebf9bcp-3f;
  y = y * f + 0x1.62e42ap-1f;
  y = y * f + 1.0f;
  const Vec power = (Vec)(((BitVec)shifted << 23) + (127u << 23));
  return Select(x < -126.0f, Vec{}, y * power);
}

// ---- 16-bit elements ----

SPATTN_INLINE Vec FromBfloat16(HalfVec h) {
  return (Vec)(__builtin_convertvector(h, BitVec) << 16);
}

// Rounds to nearest, ties to even; a NaN keeps its sign and stays a NaN.
SPATTN_INLINE HalfVec ToBfloat16(Vec x) {
#if defined(SPATTN_HAS_DPBF16)
  return (HalfVec)_mm512_cvtneps_pbh(x);
#else
  const BitVec bits = (BitVec)x;
  const BitVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const BitVec quiet = bits | 0x400000u;
  const BitVec kept = (x == x) ? rounded : quiet;
  return __builtin_convertvector(kept >> 16, HalfVec);
#endif
}

SPATTN_INLINE Vec FromFloat16(HalfVec h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  const BitVec bits = __builtin_convertvector(h, BitVec);
  const BitVec magnitude = bits & 0x7fffu;
  const BitVec normal = (magnitude << 13) + (112u << 23);  // rebias 15 to 127
  const BitVec special = (magnitude << 13) | 0x7f800000u;  // Inf, NaN
  const BitVec tiny = (BitVec)(__builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-24f);
  BitVec value = magnitude < 0x400u ? tiny : normal;
  value = magnitude >= 0x7c00u ? special : value;
  return (Vec)(value | ((bits & 0x8000u) << 16));
#endif
}

// Rounds to nearest, ties to even; beyond 65504 it becomes Inf.
SPATTN_INLINE HalfVec ToFloat16(Vec x) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const BitVec sign = (BitVec)x & 0x80000000u;
  const BitVec magnitude = (BitVec)x ^ sign;
  const BitVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the float 0.5 has the same unit in the last place as the subnormal float16: adding
  // it rounds, and what is left over 0.5 is the subnormal's bits.
  const BitVec tiny = (BitVec)((Vec)magnitude + 0.5f) - 0x3f000000u;
  BitVec value = magnitude < (113u << 23) ? tiny : normal;
  value = magnitude >= 0x47800000u ? BitVec{} + 0x7c00u : value;  // 65536 and up
  value = magnitude > 0x7f800000u ? BitVec{} + 0x7e00u : value;   // NaN
  return __builtin_convertvector(value | (sign >> 16), HalfVec);
#endif
}

// ---- shuffles ----

// Elements of a followed by b, by their number.
#if defined(__clang__)
#define SPATTN_SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SPATTN_SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SPATTN_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (IntVec4{__VA_ARGS__}))
#define SPATTN_SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (HalfVec8{__VA_ARGS__}))
#endif

// to[j][i] = from[i][j] for i, j < 4; leading dimensions in elements.
SPATTN_INLINE void Transpose4x4(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  const Vec4 r0 = LoadAs<Vec4>(from), r1 = LoadAs<Vec4>(from + ld_from);
  const Vec4 r2 = LoadAs<Vec4>(from + 2 * ld_from), r3 = LoadAs<Vec4>(from + 3 * ld_from);
  const Vec4 lo01 = SPATTN_SHUFFLE4(r0, r1, 0, 4, 1, 5), hi01 = SPATTN_SHUFFLE4(r0, r1, 2, 6, 3, 7);
  const Vec4 lo23 = SPATTN_SHUFFLE4(r2, r3, 0, 4, 1, 5), hi23 = SPATTN_SHUFFLE4(r2, r3, 2, 6, 3, 7);
  StoreAs(to, SPATTN_SHUFFLE4(lo01, lo23, 0, 1, 4, 5));
  StoreAs(to + ld_to, SPATTN_SHUFFLE4(lo01, lo23, 2, 3, 6, 7));
  StoreAs(to + 2 * ld_to, SPATTN_SHUFFLE4(hi01, hi23, 0, 1, 4, 5));
  StoreAs(to + 3 * ld_to, SPATTN_SHUFFLE4(hi01, hi23, 2, 3, 6, 7));
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_SIMD_H_
