// pipeline.cuh — the pipeline of the attention kernels: a list's tiles pass through shared memory.
#pragma once
#include "cuda/device/device.cuh"

namespace spattn {

// PassTiles where shared memory has room for one buffer: each tile is loaded, then worked on.
template <typename List, typename NeedsMask, typename Load, typename Prepare, typename Step>
DEVICE void PassTilesInTurn(const List& list, NeedsMask needs_mask, Load load, Prepare prepare,
                            Step step) {
#pragma unroll 1
  for (int n = 0; n < list.Tiles(); ++n) {
    const Blocks blocks = list.Fetch(n);
    const bool is_masked = needs_mask(blocks);
    if (n > 0) __syncthreads();  // every warp has left the buffer
    if (is_masked) {
      load(True{}, 0, blocks);
    } else {
      load(False{}, 0, blocks);
    }
    CopyCommit();
    CopyWait<0>();
    const bool flagged = __syncthreads_or(is_masked && prepare(0));
    if (is_masked) {
      step(True{}, n, 0, flagged, [] {});
    } else {
      step(False{}, n, 0, false, [] {});
    }
  }
  CopyCommit();  // of the tile's own rows, where the list is empty
  CopyWait<0>();
  __syncthreads();
}

// Passes the tiles of a list through kStages buffers: kStages - 1 tiles are on their way while one
// is worked on. kCtas: how many share an SM.
//   needs_mask(blocks)             whether the tile must take the masked path
//   load(masked, buffer, blocks)   starts the copies of a tile; masked is True or False
//   prepare(buffer)                after this thread's own copies of a masked tile have landed,
//                                  before the barrier; what any thread returns true for, every step
//                                  sees as `flagged`
//   step(masked, n, buffer, flagged, prefetch)   works on tile n; calls prefetch() once where
//                                  products are under way: then copies of a tile to come may start
template <int kStages, int kCtas, typename List, typename NeedsMask, typename Load,
          typename Prepare, typename Step>
DEVICE void PassTiles(const List& list, NeedsMask needs_mask, Load load, Prepare prepare,
                      Step step) {
  if constexpr (kStages == 1) {
    PassTilesInTurn(list, needs_mask, load, prepare, step);
    return;
  }
  constexpr int kAhead = Max(kStages - 1, 1);
  const int tiles = list.Tiles();
  unsigned masked = 0;  // bit i: tile n + i takes the masked path
  const auto start = [&](const Blocks& blocks, int buffer, int ahead) {
    if (needs_mask(blocks)) {
      masked |= 1u << ahead;
      load(True{}, buffer, blocks);
    } else {
      load(False{}, buffer, blocks);
    }
  };
  Blocks next[kAhead + 1];
#pragma unroll
  for (int i = 0; i <= kAhead; ++i) next[i] = list.Fetch(i);
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < tiles) start(next[i], i, i);
    CopyCommit();
  }
  Blocks coming = next[kAhead];
  int buffer = 0;
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    CopyWait<kAhead - 1>();
    const bool is_masked = masked & 1;
    masked >>= 1;
    bool flagged = is_masked && prepare(buffer);
    FenceForWgmma();
    if (is_masked) {
      flagged = __syncthreads_or(flagged);
    } else {
      __syncthreads();
    }
    const auto prefetch = [&] {
      if (n + kAhead < tiles) {  // into the buffer of tile n - 1, which every warp has left
        start(coming, buffer == 0 ? kAhead : buffer - 1, kAhead - 1);
        coming = list.Fetch(n + kAhead + 1);
      }
      CopyCommit();
    };
    // A CTA that has an SM for itself has no other's products to fill this time.
    constexpr bool kLate = kHasWgmma && kCtas == 1;
    if (is_masked || !kLate) prefetch();
    if (is_masked) {
      step(True{}, n, buffer, flagged, [] {});
    } else {
      step(False{}, n, buffer, false, [&] {
        if (kLate) prefetch();
      });
    }
    buffer = buffer == kAhead ? 0 : buffer + 1;
  }
  CopyWait<0>();
  __syncthreads();  // everything in shared memory has landed and is free again
}

}  // namespace spattn
