// blocks_softmax.cu — softmax over the blocks of each query, and its gradient (SPATTN_GRADIENT).
//
// Math, per batch b, head h, query i (j runs over the keys of the blocks in its q block's list):
//   s_ij  = scale * x_ij where i attends to j, the lowest finite float elsewhere (SPATTN_MASKED)
//   y_ij  = exp(s_ij - max_j s_ij) / sum_j exp(s_ij - max_j s_ij)
//   dx_ij = scale * y_ij * (dy_ij - sum_j dy_ij y_ij)
//   Blocks in no list are zeros.
//
// Mapping: one CTA per (8 queries of a q block, head, batch) = grid (x, y, z), one warp a query.
//          Its lanes take units of 8 keys, 4 blocks of 64 or 32 blocks of 8 at a time: 8 rows of a
//          block of 8 are 128 bytes in a row.
// Stages:  maximum and sum (gradient: sum of dy y) over the list | across lanes | the list again,
//          to write | blocks in no list, which the q blocks of a head share out
// Cost:    reads x twice, of which L2 gives the second where the rows of the resident CTAs fit;
//          writes y. Gradient: y and dy twice, dx. Some 15 instructions an element: bytes are the
//          floor.
// Numerics: float32 inside, one rounding at the end; a running maximum per lane. Bitwise
//          deterministic: a lane takes its units in order, lanes add up as a butterfly.
#include "cuda/device/blocks.cuh"

namespace spattn {

// ---- config ----

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kAtOnce = 32 / kBlockUnits;   // blocks that a warp takes at a time
constexpr float kLowest = -3.40282347e38f;  // the lowest finite float
using X = Element<SPATTN_SCORES>;           // of x
using Y = Element<SPATTN_WEIGHTS>;          // of all others

// ---- device helpers ----

// What a warp does: a query, and which unit of which of kAtOnce blocks each lane takes.
struct Query {
  int batch, head, q_block, row;  // row of the block
  int lane_block, column;

  DEVICE Query Make() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {static_cast<int>(blockIdx.z),
            static_cast<int>(blockIdx.y),
            static_cast<int>(blockIdx.x / kBlockUnits),
            static_cast<int>(blockIdx.x % kBlockUnits) * kWarps + warp,
            lane / kBlockUnits,
            lane % kBlockUnits * kUnit};
  }
  template <typename E>
  __forceinline__ E* UnitAt(const SpattnArray& array, const SpattnBlocks& g, int64_t block) const {
    return BlockAt<E>(array, g, batch, head, block) + row * kBlock + column;
  }
};

// Calls body(block) for this lane's block in each step through a list.
template <typename Body>
DEVICE void ForBlocks(const List& list, const Query& query, Body body) {
#pragma unroll 2
  for (int at = query.lane_block; at < list.size; at += kAtOnce) {
    const int block = list.Fetch(at).block;
    if (block >= 0) body(block);
  }
}

// Zeroes this query's row of the blocks that no list has and that fall to its q block.
DEVICE void ZeroUnlisted(const SpattnCudaSoftmaxParams& params, const SpattnArray& written,
                         const Query& query) {
  const SpattnBlocks& g = params.call.blocks;
  const uint8_t* listed =
      params.is_listed + (params.call.lut.heads == 1 ? 0 : query.head) * g.blocks;
  for (int64_t block = query.q_block + query.lane_block * g.q_blocks; block < g.blocks;
       block += kAtOnce * g.q_blocks) {
    const float zeros[kUnit] = {};
    if (!__ldg(listed + block)) WriteUnit(zeros, query.UnitAt<Y>(written, g, block));
  }
}

DEVICE float SumOfLanes(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// The scores of a unit.
DEVICE void ReadScores(const SpattnBlocksSoftmax& call, const Query& query, int64_t block,
                       float (&s)[kUnit]) {
  const SpattnBlocks& g = call.blocks;
  ReadUnit(query.UnitAt<const X>(call.x, g, block), s);
  unsigned allowed = 0xff;
  if (SPATTN_MASKED) {  // one byte of the query's word
    const int64_t head = call.mask_heads == 1 ? 0 : query.head;
    const int64_t word = (head * kBlock + query.row) * g.blocks + block;
    allowed =
        __ldg(static_cast<const uint8_t*>(call.mask) + word * kBlockUnits + query.column / kUnit);
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {  // rounded: the largest less itself is 0, however large
    s[i] = allowed >> i & 1 ? __fmul_rn(call.scale, s[i]) : kLowest;
  }
}

// Sum of exp(s - peak), with a peak that grows.
struct RunningSum {
  float peak, sum;

  // exp(s - peak) where all is -inf too.
  DEVICE float Shift(float peak) { return peak == -kInf ? 0 : peak; }

  __forceinline__ void MoveTo(float new_peak) {
    sum *= expf(peak - Shift(new_peak));
    peak = new_peak;
  }
  __forceinline__ void Add(const float (&s)[kUnit]) {
    float new_peak = peak;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) new_peak = fmaxf(new_peak, s[i]);
    MoveTo(new_peak);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) sum += expf(s[i] - Shift(peak));
  }
};

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads)
    blocks_softmax(const __grid_constant__ SpattnCudaSoftmaxParams params) {
  const SpattnBlocksSoftmax& call = params.call;
  const SpattnBlocks& g = call.blocks;
  const Query query = Query::Make();
  const List list =
      List::Make(call.lut, query.head, query.q_block, g.q_blocks, g.blocks, g.kv_blocks);
#if SPATTN_GRADIENT
  const auto read = [&](int block, float (&y)[kUnit], float (&dy)[kUnit]) {
    ReadUnit(query.UnitAt<const Y>(call.y, g, block), y);
    ReadUnit(query.UnitAt<const Y>(call.dy, g, block), dy);
  };
  float delta = 0;
  ForBlocks(list, query, [&](int block) {
    float y[kUnit], dy[kUnit];
    read(block, y, dy);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) delta = fmaf(dy[i], y[i], delta);
  });
  delta = SumOfLanes(delta);
  ForBlocks(list, query, [&](int block) {
    float y[kUnit], dy[kUnit];
    read(block, y, dy);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) y[i] = (dy[i] - delta) * y[i] * call.scale;
    WriteUnit(y, query.UnitAt<Y>(call.dx, g, block));
  });
  ZeroUnlisted(params, call.dx, query);
#else
  RunningSum running{-kInf, 0};
  ForBlocks(list, query, [&](int block) {
    float s[kUnit];
    ReadScores(call, query, block, s);
    running.Add(s);
  });
  float peak = running.peak;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, lanes));
  }
  running.MoveTo(peak);
  const float sum = SumOfLanes(running.sum);
  ForBlocks(list, query, [&](int block) {
    float s[kUnit];
    ReadScores(call, query, block, s);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) s[i] = expf(s[i] - peak) / sum;
    WriteUnit(s, query.UnitAt<Y>(call.y, g, block));
  });
  ZeroUnlisted(params, call.y, query);
#endif
}

}  // namespace spattn
