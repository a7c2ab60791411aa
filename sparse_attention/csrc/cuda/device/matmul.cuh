// matmul.cuh — the two products of attention, by one warp (sm_90a: four), on any device.
//
//   MatmulABt   c = a bT   scores: q kT; a and b in shared memory, rows of contiguous elements
//   MatmulPB    c += p b   output: p v; p in registers as MatmulABt left it, b in shared memory
//
// Both may still be under way when they return: MatmulWait<k>(c) waits for all but the last k.
//
// All kernels are written on one register layout, that of the m16n8 accumulator in the PTX manual:
// in c[m][n][4], lane l holds rows 16 m + l / 4 (elements 0, 1) and 8 below (elements 2, 3),
// columns 8 n + 2 (l % 4) and the next. Four ways to get there:
//   float32            FFMA; p travels between the four lanes of a row by shuffles
//   float32 as TF32    sm_80 up: mma.sync m16n8k8; ldmatrix moves pairs of 16 bits, so also floats
//   16-bit, sm_90a     wgmma m64nNk16: the four warps of a warpgroup have 16 rows each
//   16-bit, sm_80 up   mma.sync m16n8k16 and ldmatrix
//   float16, sm_70/75  wmma m16n16k16, whose fragments have no defined layout: accumulators pass
//                      through ScratchBytes of shared memory per warp, so nothing here relies on
//                      Volta's registers
#pragma once
#include "cuda/device/device.cuh"

namespace spattn {

constexpr bool kHasMma = !kIsExact && !kHasWgmma && __CUDA_ARCH__ >= 800;
constexpr bool kHasWmma = !kIsFloat && __CUDA_ARCH__ < 800;

// ---- wmma scratch ----

constexpr int kScratchPitch = 20;  // floats; rows of a 16 x 16 accumulator
template <int kColumns>            // widest p of a kernel
constexpr int ScratchBytes() {
  return kHasWmma ? 16 * (kScratchPitch * 4 + (kColumns + 8) * 2) : 0;
}

// ---- operands ----

// The b of a product, or with wgmma its a: in shared memory, in a Tile.
struct SmemOperand {
  const T* data;
  // With wgmma, which finds it by a descriptor, the low half of that: where it begins and, from bit
  // 16, how far it is to the next panel of 64 columns, in 16 bytes. Whole warps hold the same: from
  // a shuffle nearby the compiler sees so and computes it for all of them, in uniform registers.
  uint32_t address;

  DEVICE SmemOperand Make(const T* data) {
    uint32_t address = 0;
    if (kHasWgmma) address = __shfl_sync(kFullWarp, SmemAddress(data) >> 4, 0);
    return {data, address};
  }
  __forceinline__ SmemOperand At(int elements) const {
    return {data + elements, address + elements * static_cast<int>(sizeof(T)) / 16};
  }
  // Where a transposed b is wider than a panel.
  __forceinline__ SmemOperand WithDistance(int panel_elements) const {
    return {data, address + (panel_elements * static_cast<int>(sizeof(T)) / 16 << 16)};
  }
};

// How many products of a row and a column an instruction adds up on tensor cores: two units of 16 bytes.
constexpr int kDepth = 2 * kVector;

// Elements that were read as they lie become what an instruction multiplies. TF32's would cut a float
// after 10 bits; to round it halves the error, and takes away its bias.
template <int kCount>
DEVICE void RoundFragment(uint32_t (&words)[kCount]) {
#if SPATTN_TF32
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(words[i]) : "f"(__uint_as_float(words[i])));
  }
#endif
}

// The a of MatmulABt: kM * 16 rows of a warp. kInRegisters: its fragments are read once and kept.
template <int kM, typename ATile, bool kInRegisters>
struct RowOperand {
  static constexpr int kSteps = PaddedDim(ATile::kDimension) / kDepth;
  static constexpr int kPitch = ATile::kRowPitch, kPanel = ATile::kPanel;
  static constexpr bool kKept = kInRegisters && (kHasMma || kHasWgmma);
  const T* rows;
  SmemOperand group;  // with wgmma, the 64 rows of the warpgroup
  uint32_t fragments[kKept ? kSteps : 1][kM][4];

  // Called once the rows are in shared memory.
  __forceinline__ void Load(const T* from, int first_row) {
    rows = from + first_row * kPitch;
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) Read(k, fragments[k]);
    }
  }
  // Called in each turn of a loop of products.
  __forceinline__ void Locate(const T* from) {
    if constexpr (kHasWgmma && !kKept) {
      group = SmemOperand::Make(from + threadIdx.x / 128 * 64 * 64);
    }
  }
  __forceinline__ void Read(int k, uint32_t (&to)[kM][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const T* at = rows + ATile::Offset(m * 16 + lane % 16, k * kDepth + lane / 16 * kVector);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[m][0]), "=r"(to[m][1]), "=r"(to[m][2]), "=r"(to[m][3])
                   : "r"(SmemAddress(at)));
      RoundFragment(to[m]);
    }
  }
};

// p as the a of the next product: 16 columns from n8 tile k.
template <int kM, int kN>
DEVICE void PackFragments(uint32_t (&a)[kM][4], const float (&p)[kM][kN][4], int k) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[m][i] = PackPair(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1]);
    }
  }
}

// The whole of p.
template <int kM, int kN>
DEVICE void PackAllFragments(uint32_t (&a)[kN / 2][kM][4], const float (&p)[kM][kN][4]) {
#pragma unroll
  for (int k = 0; k < kN; k += 2) PackFragments(a[k / 2], p, k);
}

template <int kM, int kN>
DEVICE void Clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM * kN * 4; ++i) c[i / (kN * 4)][i / 4 % kN][i % 4] = 0;
}

// ---- sm_80 and later ----

#if SPATTN_DTYPE == 2
#define SPATTN_PTX_TYPE "bf16"
#else
#define SPATTN_PTX_TYPE "f16"
#endif
#if SPATTN_DTYPE == 0
#define SPATTN_MMA "m16n8k8.row.col.f32.tf32.tf32.f32"
#else
#define SPATTN_MMA "m16n8k16.row.col.f32." SPATTN_PTX_TYPE "." SPATTN_PTX_TYPE ".f32"
#endif

DEVICE void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned." SPATTN_MMA
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <typename BTile, int kM, int kN, typename A>
DEVICE void MmaABt(float (&c)[kM][kN][4], const A& a, const T* b) {
  const int lane = threadIdx.x % 32;
  const uint32_t b_lane =
      SmemAddress(b + (lane % 8 + lane / 16 * 8) * BTile::kRowPitch + lane / 8 % 2 * kVector);
// Floats take twice the steps: all of them at once would spill registers.
#pragma unroll(kIsFloat && !A::kKept ? 4 : A::kSteps)
  for (int k = 0; k < A::kSteps; ++k) {
    uint32_t read[kM][4];
    if constexpr (!A::kKept) a.Read(k, read);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b_now[4];
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
          : "=r"(b_now[0]), "=r"(b_now[1]), "=r"(b_now[2]), "=r"(b_now[3])
          : "r"(b_lane + (n * 8 * BTile::kRowPitch + k * kDepth) * static_cast<int>(sizeof(T))));
      RoundFragment(b_now);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (A::kKept) {
          Mma(c[m][n], a.fragments[k][m], b_now[0], b_now[1]);
          Mma(c[m][n + 1], a.fragments[k][m], b_now[2], b_now[3]);
        } else {
          Mma(c[m][n], read[m], b_now[0], b_now[1]);
          Mma(c[m][n + 1], read[m], b_now[2], b_now[3]);
        }
      }
    }
  }
}

template <typename BTile, int kM, int kN, int kOut>
DEVICE void MmaPB(float (&c)[kM][kOut][4], const float (&p)[kM][kN][4], const T* b) {
  const int lane = threadIdx.x % 32;
  const uint32_t b_lane = SmemAddress(b + lane % 16 * BTile::kRowPitch + lane / 16 * 8);
#pragma unroll
  for (int k = 0; k < kN; k += 2) {
    uint32_t a[kM][4];
    PackFragments(a, p, k);
#pragma unroll
    for (int n = 0; n < kOut; n += 2) {
      uint32_t b0, b1, b2, b3;
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
          : "=r"(b0), "=r"(b1), "=r"(b2), "=r"(b3)
          : "r"(b_lane + (k * 8 * BTile::kRowPitch + n * 8) * static_cast<int>(sizeof(T))));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma(c[m][n], a[m], b0, b1);
        Mma(c[m][n + 1], a[m], b2, b3);
      }
    }
  }
}

// A sum does not mind the order of its products: an instruction's 8 columns of a are those of an n8 tile
// of p with the even ones first, as the accumulator's lanes hold them, and b's rows are read to match.
template <typename BTile, int kM, int kN, int kOut>
DEVICE void Tf32PB(float (&c)[kM][kOut][4], const float (&p)[kM][kN][4], const float* b) {
  const int lane = threadIdx.x % 32;
  const float* b_lane = b + lane % 4 * 2 * BTile::kRowPitch + lane / 4;
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = __float_as_uint(p[m][k][i % 2 * 2 + i / 2]);
      RoundFragment(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      const float* at = b_lane + k * 8 * BTile::kRowPitch + n * 8;
      uint32_t b_now[2] = {__float_as_uint(at[0]), __float_as_uint(at[BTile::kRowPitch])};
      RoundFragment(b_now);
#pragma unroll
      for (int m = 0; m < kM; ++m) Mma(c[m][n], a[m], b_now[0], b_now[1]);
    }
  }
}

// ---- sm_90a ----

// The registers of c, half as many as its columns: their names in an instruction, and what they are from
// n8 tile i on.
#define SPATTN_C16_NAMES "%0, %1, %2, %3, %4, %5, %6, %7"
#define SPATTN_C32_NAMES SPATTN_C16_NAMES ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SPATTN_C48_NAMES SPATTN_C32_NAMES ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SPATTN_C64_NAMES SPATTN_C48_NAMES ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SPATTN_C80_NAMES SPATTN_C64_NAMES ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPATTN_C96_NAMES SPATTN_C80_NAMES ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SPATTN_C112_NAMES SPATTN_C96_NAMES ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SPATTN_C128_NAMES SPATTN_C112_NAMES ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SPATTN_C8(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SPATTN_C16(c, i) SPATTN_C8(c, i), SPATTN_C8(c, i + 1)
#define SPATTN_C32(c, i) SPATTN_C16(c, i), SPATTN_C16(c, i + 2)
#define SPATTN_C48(c, i) SPATTN_C32(c, i), SPATTN_C16(c, i + 4)
#define SPATTN_C64(c, i) SPATTN_C32(c, i), SPATTN_C32(c, i + 4)
#define SPATTN_C80(c, i) SPATTN_C64(c, i), SPATTN_C16(c, i + 8)
#define SPATTN_C96(c, i) SPATTN_C64(c, i), SPATTN_C32(c, i + 8)
#define SPATTN_C112(c, i) SPATTN_C64(c, i), SPATTN_C48(c, i + 8)
#define SPATTN_C128(c, i) SPATTN_C64(c, i), SPATTN_C64(c, i + 8)
// A descriptor, from its low half; the high half says: 1024 bytes from 8 rows to the next 8,
// 128-byte swizzle. And the predicate p: whether c is added to.
#define SPATTN_DESCRIPTOR(name, low) \
  ".reg .b64 " name ";\n mov.b64 " name ", {" low ", 0x40000040};\n"
#define SPATTN_IF(accumulates) ".reg .pred p;\n setp.ne.b32 p, " accumulates ", 0;\n"
#define SPATTN_M64(n) \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." SPATTN_PTX_TYPE "." SPATTN_PTX_TYPE

// c = a b or c += a b for up to 128 columns, 16 products deep. b: K-major as it lies (scores), or
// transposed.
template <int kColumns, bool kTransposed>
DEVICE void Wgmma(float (*c)[4], const uint32_t (&a)[4], uint32_t b, int accumulates) {
  static_assert(kColumns % 16 == 0 && kColumns <= 128, "an instruction each");
#define SPATTN_FROM_REGISTERS(n, a_names, b_name, accumulates_name, transposed_name)              \
  if constexpr (kColumns == n) {                                                                  \
    asm volatile("{" SPATTN_IF(accumulates_name) SPATTN_DESCRIPTOR("b", b_name)                   \
                     SPATTN_M64(n) " {" SPATTN_C##n##_NAMES "}, " a_names                         \
                                                            ", b, p, 1, 1, " transposed_name ";}" \
                 : SPATTN_C##n(c, 0)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulates),          \
                   "n"(kTransposed ? 1 : 0));                                                     \
  }
  SPATTN_FROM_REGISTERS(16, "{%8, %9, %10, %11}", "%12", "%13", "%14")
  SPATTN_FROM_REGISTERS(32, "{%16, %17, %18, %19}", "%20", "%21", "%22")
  SPATTN_FROM_REGISTERS(48, "{%24, %25, %26, %27}", "%28", "%29", "%30")
  SPATTN_FROM_REGISTERS(64, "{%32, %33, %34, %35}", "%36", "%37", "%38")
  SPATTN_FROM_REGISTERS(80, "{%40, %41, %42, %43}", "%44", "%45", "%46")
  SPATTN_FROM_REGISTERS(96, "{%48, %49, %50, %51}", "%52", "%53", "%54")
  SPATTN_FROM_REGISTERS(112, "{%56, %57, %58, %59}", "%60", "%61", "%62")
  SPATTN_FROM_REGISTERS(128, "{%64, %65, %66, %67}", "%68", "%69", "%70")
#undef SPATTN_FROM_REGISTERS
}
// The same with a in shared memory too; kTransposed: both are.
template <int kColumns, bool kTransposed>
DEVICE void Wgmma(float (*c)[4], uint32_t a, uint32_t b, int accumulates) {
  static_assert(kColumns >= 32 && kColumns % 16 == 0 && (kColumns <= 64 || kColumns == 128),
                "an instruction each");
#define SPATTN_FROM_MEMORY(n, a_name, b_name, accumulates_name, transposed_name)           \
  if constexpr (kColumns == n) {                                                           \
    asm volatile("{" SPATTN_IF(accumulates_name) SPATTN_DESCRIPTOR("a", a_name)            \
                     SPATTN_DESCRIPTOR("b", b_name) SPATTN_M64(n) " {" SPATTN_C##n##_NAMES \
                 "}, a, b, p, 1, 1, " transposed_name ", " transposed_name ";}"            \
                 : SPATTN_C##n(c, 0)                                                       \
                 : "r"(a), "r"(b), "r"(accumulates), "n"(kTransposed ? 1 : 0));            \
  }
  SPATTN_FROM_MEMORY(32, "%16", "%17", "%18", "%19")
  SPATTN_FROM_MEMORY(48, "%24", "%25", "%26", "%27")
  SPATTN_FROM_MEMORY(64, "%32", "%33", "%34", "%35")
  SPATTN_FROM_MEMORY(128, "%64", "%65", "%66", "%67")
#undef SPATTN_FROM_MEMORY
}
#undef SPATTN_C16_NAMES
#undef SPATTN_C32_NAMES
#undef SPATTN_C48_NAMES
#undef SPATTN_C64_NAMES
#undef SPATTN_C80_NAMES
#undef SPATTN_C96_NAMES
#undef SPATTN_C112_NAMES
#undef SPATTN_C128_NAMES
#undef SPATTN_C8
#undef SPATTN_C16
#undef SPATTN_C32
#undef SPATTN_C48
#undef SPATTN_C64
#undef SPATTN_C80
#undef SPATTN_C96
#undef SPATTN_C112
#undef SPATTN_C128
#undef SPATTN_DESCRIPTOR
#undef SPATTN_IF
#undef SPATTN_M64

DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <typename BTile, int kN, typename A>
DEVICE void WgmmaABt(float (&c)[1][kN][4], const A& a, const SmemOperand& b) {
  constexpr int kWide = kN % 16 == 0 ? 16 : 8;  // n8 tiles at a time
  static_assert(kN % kWide == 0, "64 or 128 columns at a time");
  WgmmaFence();
#pragma unroll
  for (int n = 0; n < kN; n += kWide) {
#pragma unroll
    for (int k = 0; k < A::kSteps; ++k) {
      const SmemOperand b_now = b.At(n * 8 * 64 + k / 4 * BTile::kPanel + k % 4 * 16);
      if constexpr (A::kKept) {
        Wgmma<kWide * 8, false>(&c[0][n], a.fragments[k][0], b_now.address, k > 0);
      } else {
        const SmemOperand a_now = a.group.At(k / 4 * A::kPanel + k % 4 * 16);
        Wgmma<kWide * 8, false>(&c[0][n], a_now.address, b_now.address, k > 0);
      }
    }
  }
  WgmmaCommit();
}

// p in fragments of 16 columns. c may have fewer columns than b: the first ones. One instruction takes
// them from two panels, of the second also in part.
template <typename BTile, int kSteps, int kOut>
DEVICE void WgmmaPB(float (&c)[1][kOut][4], const uint32_t (&p)[kSteps][1][4],
                    const SmemOperand& b) {
  const SmemOperand panels = b.WithDistance(BTile::kPanel);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    Wgmma<kOut * 8, true>(&c[0][0], p[k][0], panels.At(k * 16 * 64).address, 1);
  }
  WgmmaCommit();
}

// c = aT b for 64 rows and up to 64 columns of c, summed over all kRows rows of the tiles; a and b point
// to a panel of theirs.
template <int kRows, int kN>
DEVICE void WgmmaAtB(float (&c)[1][kN][4], const SmemOperand& a, const SmemOperand& b) {
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    Wgmma<kN * 8, true>(&c[0][0], a.At(k * 16 * 64).address, b.At(k * 16 * 64).address, k > 0);
  }
  WgmmaCommit();
}

// ---- sm_70 and sm_75: float16 ----

struct WmmaFragment {
  uint32_t r[8];
};
struct WmmaAccumulator {
  float r[8];
};

#define SPATTN_WMMA_LOAD(name, operand, layout)                                          \
  DEVICE WmmaFragment name(const T* p, int pitch) {                                      \
    WmmaFragment f;                                                                      \
    asm volatile("wmma.load." operand ".sync.aligned.m16n16k16." layout                  \
                 ".shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"               \
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3]), "=r"(f.r[4]), \
                   "=r"(f.r[5]), "=r"(f.r[6]), "=r"(f.r[7])                              \
                 : "r"(SmemAddress(p)), "r"(pitch)                                       \
                 : "memory");                                                            \
    return f;                                                                            \
  }
SPATTN_WMMA_LOAD(WmmaLoadA, "a", "row")
SPATTN_WMMA_LOAD(WmmaLoadBColumns, "b", "col")  // b stored [n, k]
SPATTN_WMMA_LOAD(WmmaLoadBRows, "b", "row")     // b stored [k, n]
#undef SPATTN_WMMA_LOAD

template <bool kBRows>
DEVICE void Wmma(WmmaAccumulator& c, const WmmaFragment& a, const WmmaFragment& b) {
#define SPATTN_WMMA(layout)                                                                    \
  asm volatile("wmma.mma.sync.aligned.row." layout                                             \
               ".m16n16k16.f32.f32 "                                                           \
               "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11, %12, %13, %14, %15}, "    \
               "{%16, %17, %18, %19, %20, %21, %22, %23}, {%0, %1, %2, %3, %4, %5, %6, %7};"   \
               : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3]), "+f"(c.r[4]),         \
                 "+f"(c.r[5]), "+f"(c.r[6]), "+f"(c.r[7])                                      \
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(a.r[4]), "r"(a.r[5]), \
                 "r"(a.r[6]), "r"(a.r[7]), "r"(b.r[0]), "r"(b.r[1]), "r"(b.r[2]), "r"(b.r[3]), \
                 "r"(b.r[4]), "r"(b.r[5]), "r"(b.r[6]), "r"(b.r[7]))
  if (kBRows)
    SPATTN_WMMA("row");
  else
    SPATTN_WMMA("col");
#undef SPATTN_WMMA
}

// Adds a 16 x 16 accumulator to two neighbouring n8 tiles of c, through the warp's scratch.
DEVICE void AddAccumulator(float (&left)[4], float (&right)[4], const WmmaAccumulator& acc,
                           float* scratch) {
  asm volatile(
      "wmma.store.d.sync.aligned.m16n16k16.row.shared.f32 [%8], {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%9;" ::"f"(acc.r[0]),
      "f"(acc.r[1]), "f"(acc.r[2]), "f"(acc.r[3]), "f"(acc.r[4]), "f"(acc.r[5]), "f"(acc.r[6]),
      "f"(acc.r[7]), "r"(SmemAddress(scratch)), "r"(kScratchPitch)
      : "memory");
  __syncwarp();
  const int lane = threadIdx.x % 32;
  const float* at = scratch + lane / 4 * kScratchPitch + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* row = at + i / 2 * 8 * kScratchPitch + i % 2;
    left[i] += row[0];
    right[i] += row[8];
  }
  __syncwarp();
}

template <typename BTile, int kM, int kN, typename A>
DEVICE void WmmaABt(float (&c)[kM][kN][4], const A& a, const T* b, float* scratch) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      WmmaAccumulator acc = {};
#pragma unroll
      for (int k = 0; k < A::kSteps; ++k) {
        Wmma<false>(acc, WmmaLoadA(a.rows + m * 16 * A::kPitch + k * 16, A::kPitch),
                    WmmaLoadBColumns(b + n * 8 * BTile::kRowPitch + k * 16, BTile::kRowPitch));
      }
      AddAccumulator(c[m][n], c[m][n + 1], acc, scratch);
    }
  }
}

template <typename BTile, int kM, int kN, int kOut>
DEVICE void WmmaPB(float (&c)[kM][kOut][4], const float (&p)[kM][kN][4], const T* b,
                   float* scratch) {
  constexpr int kPitch = kN * 8 + 8;
  const int lane = threadIdx.x % 32;
  T* p_smem = reinterpret_cast<T*>(scratch + 16 * kScratchPitch);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      T* at = p_smem + lane / 4 * kPitch + n * 8 + lane % 4 * 2;
      StorePair(at, p[m][n][0], p[m][n][1]);
      StorePair(at + 8 * kPitch, p[m][n][2], p[m][n][3]);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kOut; n += 2) {
      WmmaAccumulator acc = {};
#pragma unroll
      for (int k = 0; k < kN; k += 2) {
        Wmma<true>(acc, WmmaLoadA(p_smem + k * 8, kPitch),
                   WmmaLoadBRows(b + k * 8 * BTile::kRowPitch + n * 8, BTile::kRowPitch));
      }
      AddAccumulator(c[m][n], c[m][n + 1], acc, scratch);
    }
  }
}

// ---- float32 ----

DEVICE void Fma4(float& c, const float4& a, const float4& b) {
  c = fmaf(a.x, b.x, c);
  c = fmaf(a.y, b.y, c);
  c = fmaf(a.z, b.z, c);
  c = fmaf(a.w, b.w, c);
}

template <typename BTile, int kM, int kN, typename A>
DEVICE void FmaABt(float (&c)[kM][kN][4], const A& a, const float* b) {
  const int lane = threadIdx.x % 32;
  const float* a_lane = a.rows + lane / 4 * A::kPitch;
  const float* b_lane = b + lane % 4 * 2 * BTile::kRowPitch;
#pragma unroll 2
  for (int d = 0; d < BTile::kDimension; d += 4) {
    float4 a_now[kM][2];
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      a_now[i / 2][i % 2] = *reinterpret_cast<const float4*>(a_lane + i * 8 * A::kPitch + d);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 b_now =
            *reinterpret_cast<const float4*>(b_lane + (n * 8 + j) * BTile::kRowPitch + d);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          Fma4(c[m][n][j], a_now[m][0], b_now);
          Fma4(c[m][n][2 + j], a_now[m][1], b_now);
        }
      }
    }
  }
}

template <typename BTile, int kM, int kN, int kOut>
DEVICE void FmaPB(float (&c)[kM][kOut][4], const float (&p)[kM][kN][4], const float* b) {
  const int lane = threadIdx.x % 32;
  const float* b_lane = b + lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < kN; ++k) {
#pragma unroll
    for (int source = 0; source < 4;
         ++source) {  // the lane of the quad that holds columns 2 source, + 1
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float p_now[kM][2];
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
          p_now[i / 2][i % 2] = __shfl_sync(kFullWarp, p[i / 2][k][i % 2 * 2 + j], source, 4);
        }
        const float* row = b_lane + (k * 8 + source * 2 + j) * BTile::kRowPitch;
#pragma unroll
        for (int n = 0; n < kOut; ++n) {
          const float2 b_now = *reinterpret_cast<const float2*>(row + n * 8);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            c[m][n][0] = fmaf(p_now[m][0], b_now.x, c[m][n][0]);
            c[m][n][1] = fmaf(p_now[m][0], b_now.y, c[m][n][1]);
            c[m][n][2] = fmaf(p_now[m][1], b_now.x, c[m][n][2]);
            c[m][n][3] = fmaf(p_now[m][1], b_now.y, c[m][n][3]);
          }
        }
      }
    }
  }
}

// ---- the two products ----

template <typename BTile, int kM, int kN, typename A>
DEVICE void MatmulABt(float (&c)[kM][kN][4], const A& a, const SmemOperand& b, float* scratch) {
  static_assert(kN % 2 == 0, "two n8 tiles at a time");
  if constexpr (kHasWgmma) {
    WgmmaABt<BTile>(c, a, b);
  } else {
    Clear(c);
    if constexpr (kIsExact) FmaABt<BTile>(c, a, b.data);
    if constexpr (kHasMma) MmaABt<BTile>(c, a, b.data);
    if constexpr (kHasWmma) WmmaABt<BTile>(c, a, b.data, scratch);
  }
}

// c has kOut * 8 columns of b, from the one where b points.
template <typename BTile, int kM, int kN, int kOut>
DEVICE void MatmulPB(float (&c)[kM][kOut][4], const float (&p)[kM][kN][4], const SmemOperand& b,
                     float* scratch) {
  static_assert(kN % 2 == 0 && kOut % 2 == 0, "two n8 tiles at a time");
  if constexpr (kHasWgmma) {
    uint32_t a[kN / 2][kM][4];
    PackAllFragments(a, p);
    WgmmaPB<BTile>(c, a, b);
  }
  if constexpr (kIsExact) FmaPB<BTile>(c, p, b.data);
  if constexpr (kHasMma && kIsFloat) Tf32PB<BTile>(c, p, b.data);
  if constexpr (kHasMma && !kIsFloat) MmaPB<BTile>(c, p, b.data);
  if constexpr (kHasWmma) WmmaPB<BTile>(c, p, b.data, scratch);
}

// Waits until at most kPending of the products are under way; results that are done then may not be
// touched before, which the compiler learns here.
template <int kPending, int kM, int... kN>
DEVICE void MatmulWait(float (&... results)[kM][kN][4]) {
  if constexpr (kHasWgmma) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    const auto settle = [](auto& c) {
      constexpr int kColumns = sizeof(c[0]) / sizeof(c[0][0]);
#pragma unroll
      for (int i = 0; i < kM * kColumns * 4; ++i)
        asm volatile("" : "+f"(c[i / (kColumns * 4)][i / 4 % kColumns][i % 4])::"memory");
    };
    (settle(results), ...);
  }
}

// ---- to memory ----

constexpr int StorePitch(int columns) { return PaddedDim(columns) + kVector; }

// Writes a warp's accumulators as rows: through kM * 16 rows of StorePitch of shared memory, so
// that they leave in whole 16-byte pieces. row_of(r) is the row of the warp's row r, or -1;
// zero_of(r): write zeros.
template <int kDim, int kM, int kOut, typename RowOf, typename ZeroOf>
DEVICE void StoreRows(float (&c)[kM][kOut][4], T* warp_rows, const RowSpan& to, int first_column,
                      RowOf row_of, ZeroOf zero_of) {
  constexpr int kPitch = StorePitch(kOut * 8), kColumns = kOut * 8, kChunks = kColumns / kVector;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      T* at = warp_rows + (m * 16 + lane / 4) * kPitch + n * 8 + lane % 4 * 2;
      StorePair(at, c[m][n][0], c[m][n][1]);
      StorePair(at + 8 * kPitch, c[m][n][2], c[m][n][3]);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < kM * 16 * kChunks; i += 32) {
    const int r = i / kChunks, column = i % kChunks * kVector, row = row_of(r);
    if (row >= 0 && first_column + column < kDim) {
      const uint4 piece = *reinterpret_cast<const uint4*>(warp_rows + r * kPitch + column);
      *reinterpret_cast<uint4*>(to.Row(row) + first_column + column) =
          zero_of(r) ? uint4{0, 0, 0, 0} : piece;
    }
  }
}

}  // namespace spattn
