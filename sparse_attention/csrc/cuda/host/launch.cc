// launch.cc — checks what the host can see, then puts the kernels on a stream.
#include <algorithm>

#include "abi/checks.h"
#include "cuda/device/params.h"
#include "cuda/host/configs.h"
#include "cuda/host/rule.h"

namespace spattn {
namespace {

// ---- checks ----

// Limits of what the kernels count in 32 bits.
constexpr int64_t kMaxPositions = (int64_t{1} << 31) - 256;
constexpr int64_t kMaxEntries = int64_t{1} << 28;  // times the 4 tiles of a block of 128

SpattnStatus CheckCudaProblem(const SpattnProblem& p) {
  SPATTN_RETURN_IF_ERROR(CheckProblem(p));
  for (const auto& [name, size] : {Named{"batch", p.batch}, Named{"heads", p.heads}}) {
    SPATTN_RETURN_IF(size > kMaxGrid, "%s must be at most %lld on a GPU, got %lld", name,
                     (LongLong)kMaxGrid, (LongLong)size);
  }
  for (const auto& [name, len] : {Named{"q_len", p.q_len}, Named{"kv_len", p.kv_len}}) {
    SPATTN_RETURN_IF(Positions(len, p.row_stride) > kMaxPositions,
                     "%s=%lld with row_stride=%lld must have at most %lld positions on a GPU", name,
                     (LongLong)len, (LongLong)p.row_stride, (LongLong)kMaxPositions);
  }
  SPATTN_RETURN_IF(p.batch * p.q_len * p.heads > kMaxPositions,
                   "batch * q_len * heads must be at most %lld on a GPU, got %lld",
                   (LongLong)kMaxPositions, (LongLong)(p.batch * p.q_len * p.heads));
  return Ok();
}

struct NamedTensor {
  const char* name;
  const SpattnTensor& tensor;
};

// The kernels move rows in pieces of 16 bytes and hold a row's stride in an int.
SpattnStatus CheckTensors(const SpattnProblem& p, std::initializer_list<NamedTensor> tensors) {
  const int64_t size = ElementSize(p.dtype), whole = 16 / size;
  for (const auto& [name, t] : tensors) {
    SPATTN_RETURN_IF(!IsAligned(t.data, 16), "%s must begin at a multiple of 16 bytes, got %p",
                     name, t.data);
    for (const int64_t stride : {t.batch_stride, t.row_stride, t.head_stride}) {
      SPATTN_RETURN_IF(stride % whole != 0, "%s must have strides in multiples of %lld, got %lld",
                       name, (LongLong)whole, (LongLong)stride);
    }
    SPATTN_RETURN_IF(t.row_stride < 0 || t.row_stride * size >= kMaxLen,
                     "%s must have a row stride in [0, 2^31) bytes, got %lld elements", name,
                     (LongLong)t.row_stride);
  }
  return Ok();
}

// Checks a plan in either direction: a tile owns `tile_blocks` blocks, and those that pass it have
// `block` positions.
SpattnStatus CheckLimits(const SpattnProblem& problem, int64_t tiles, int tile_blocks,
                         int64_t entries, int64_t mask_blocks, int32_t block,
                         const uint8_t* mask_bits) {
  SPATTN_RETURN_IF(tiles < 0 || problem.heads * tiles > kMaxPositions / tile_blocks,
                   "heads * tiles of a plan must be at most %lld on a GPU, got %d * %lld",
                   (LongLong)(kMaxPositions / tile_blocks), problem.heads, (LongLong)tiles);
  SPATTN_RETURN_IF(entries < 0 || entries > kMaxEntries,
                   "entries of a plan must be at most 2^28 on a GPU, got %lld", (LongLong)entries);
  SPATTN_RETURN_IF(mask_blocks < 0 || mask_blocks > kMaxPositions / block,
                   "mask_blocks of a plan must be at most %lld on a GPU, got %lld",
                   (LongLong)(kMaxPositions / block), (LongLong)mask_blocks);
  SPATTN_RETURN_IF(!IsAligned(mask_bits, 16),
                   "mask_bits must begin at a multiple of 16 bytes, got %p",
                   static_cast<const void*>(mask_bits));
  return Ok();
}

SpattnStatus ReadPlan(SpattnTilePlan* to, const SpattnProblem& problem, const SpattnPlan& plan) {
  SPATTN_RETURN_IF_ERROR(CheckPlanSizes(problem, plan));
  SPATTN_RETURN_IF(plan.kv_blocks > kMaxPositions / plan.block_size,
                   "kv_blocks of %d positions must be at most %lld on a GPU, got %lld",
                   plan.block_size, (LongLong)(kMaxPositions / plan.block_size),
                   (LongLong)plan.kv_blocks);
  SPATTN_RETURN_IF_ERROR(CheckLimits(problem, plan.q_tiles, plan.tile_q, plan.entries,
                                     plan.mask_blocks, plan.block_size, plan.mask_bits));
  to->heads = plan.heads;
  to->tiles = static_cast<int32_t>(plan.q_tiles);
  to->blocks = static_cast<int32_t>(plan.kv_blocks);
  to->entries = static_cast<int32_t>(plan.entries);
  to->mask_blocks = static_cast<int32_t>(plan.mask_blocks);
  to->tile_blocks = nullptr;
  to->indptr = plan.kv_indptr;
  to->indices = plan.kv_indices;
  to->mask_ids = plan.mask_ids;
  to->mask_bits = plan.mask_bits;
  return Ok();
}

SpattnStatus ReadKvPlan(SpattnTilePlan* to, const SpattnProblem& problem,
                        const SpattnKvPlan& plan) {
  SPATTN_RETURN_IF(plan.heads != 1 && plan.heads != problem.heads,
                   "the heads of the plan by keys must be 1 or heads=%d, got %d", problem.heads,
                   plan.heads);
  SPATTN_RETURN_IF(!IsBlock(plan.block_size), "block_size must be 8, 16, 32, 64 or 128, got %d",
                   plan.block_size);
  SPATTN_RETURN_IF(!IsBlock(plan.tile_kv) || plan.tile_kv < 32 || plan.tile_kv < plan.block_size,
                   "tile_kv must be 32, 64 or 128, at least block_size=%d, got %d", plan.block_size,
                   plan.tile_kv);
  const int64_t q_blocks = CountTiles(problem.q_len, problem.row_stride, plan.block_size);
  const int64_t kv_blocks = CountTiles(problem.kv_len, problem.row_stride, plan.block_size);
  SPATTN_RETURN_IF_ERROR(
      CheckCount(problem, {"q_blocks", plan.q_blocks}, q_blocks, {"q_len", problem.q_len}));
  SPATTN_RETURN_IF(plan.q_blocks > kMaxPositions / plan.block_size,
                   "q_blocks of %d positions must be at most %lld on a GPU, got %lld",
                   plan.block_size, (LongLong)(kMaxPositions / plan.block_size),
                   (LongLong)plan.q_blocks);
  const int tile_blocks = plan.tile_kv / plan.block_size;
  SPATTN_RETURN_IF(plan.kv_tiles * tile_blocks < kv_blocks,
                   "kv_tiles of tile_kv=%d must hold %lld kv blocks, got %lld", plan.tile_kv,
                   (LongLong)kv_blocks, (LongLong)plan.kv_tiles);
  SPATTN_RETURN_IF_ERROR(
      CheckIntArrays({plan.tile_blocks, plan.q_indptr, plan.q_indices, plan.mask_ids}));
  SPATTN_RETURN_IF_ERROR(CheckLimits(problem, plan.kv_tiles, tile_blocks, plan.entries,
                                     plan.mask_blocks, plan.block_size, plan.mask_bits));
  to->heads = plan.heads;
  to->tiles = static_cast<int32_t>(plan.kv_tiles);
  to->blocks = static_cast<int32_t>(plan.q_blocks);
  to->entries = static_cast<int32_t>(plan.entries);
  to->mask_blocks = static_cast<int32_t>(plan.mask_blocks);
  to->tile_blocks = plan.tile_blocks;
  to->indptr = plan.q_indptr;
  to->indices = plan.q_indices;
  to->mask_ids = plan.mask_ids;
  to->mask_bits = plan.mask_bits;
  return Ok();
}

// ---- launches ----

// How a kernel is compiled, or why no GPU of this architecture runs it.
SpattnStatus ConfigureFitting(const SpattnCudaShape& shape, int phase, SpattnCudaKernel* kernel) {
  *kernel = Configure(shape, static_cast<SpattnPhase>(phase));
  if (kernel->shared_memory <= SharedMemoryOf(shape.arch)) return Ok();
  return Failed(SPATTN_UNSUPPORTED,
                "%s with head dims %d and %d, blocks of %d and tiles of %d needs %d bytes of "
                "shared memory, this GPU (sm_%d) has %d",
                kernel->name, shape.head_dim, shape.head_dim_v, shape.block_size,
                phase == SPATTN_BWD_DKV ? shape.tile_kv : shape.tile_q, kernel->shared_memory,
                shape.arch, SharedMemoryOf(shape.arch));
}

// The number of heads whose k and v fit the L2 cache of an H100, with room for q and o.
int64_t SectionHeads(const SpattnProblem& p) {
  constexpr int64_t kBytes = 32 << 20;
  const int64_t kv_bytes = p.kv_len * (p.head_dim + p.head_dim_v) * ElementSize(p.dtype);
  return std::max<int64_t>(kBytes / std::max<int64_t>(kv_bytes, 1), 1) * (p.heads / p.kv_heads);
}

// What the kernels of a problem are specialised for, without the plan.
SpattnCudaShape ShapeOf(const SpattnProblem& p, int rule, int arch) {
  SpattnCudaShape shape = {};
  shape.arch = arch;
  shape.dtype = p.dtype;
  shape.head_dim = p.head_dim;
  shape.head_dim_v = p.head_dim_v;
  shape.is_row_strided = p.row_stride > 1;
  shape.is_scale_positive = p.softmax_scale > 0;
  shape.uses_tf32 = p.allow_tf32 != 0 && HasTf32(shape);
  shape.rule = rule;
  return shape;
}

// Kernels are found by the shape, so it holds what the next kernel depends on and no more.
void UsePlan(SpattnCudaShape* shape, const SpattnPlan& plan) {
  shape->block_size = plan.block_size;
  shape->tile_q = plan.tile_q;
  shape->tile_kv = shape->list_keys = 0;
}

void UsePlan(SpattnCudaShape* shape, const SpattnKvPlan& plan) {
  shape->block_size = plan.block_size;
  shape->tile_kv = plan.tile_kv;
  shape->tile_q = shape->list_keys = 0;
}

// attention_bwd_sm90 also depends on how many queries a kv tile lists on average.
int64_t ListQueries(const SpattnKvPlan& plan) {
  return plan.entries * plan.block_size / std::max<int64_t>(plan.heads * plan.kv_tiles, 1);
}

void UseListQueries(SpattnCudaShape* shape, const SpattnKvPlan& plan, int64_t q_len) {
  UsePlan(shape, plan);
  shape->list_keys = RoundListQueries(ListQueries(plan), q_len);
}

// What attention_bwd_sm90 has of a workspace, if it may run.
struct DqWorkspace {
  SpattnCudaDqSums sums = {};  // dq null: it does not run
  int64_t zeroed_words = 0;    // from sums.copied on
  float* bias_sums = nullptr;  // a slice for each kv tile of each sequence
  int64_t sequences = 1;       // that have lists of their own

  void Init(const SpattnProblem& p, const SpattnKvPlan& plan, const RuleOnDevice& rule, int arch,
            DeviceArena* arena) {
    SpattnCudaShape shape = ShapeOf(p, rule.parts(), arch);
    UseListQueries(&shape, plan, p.q_len);
    if (!RunsBwdSm90(shape)) return;
    // Slices may take as much memory as dq's sums, but no more.
    if (plan.kv_tiles * rule.SliceFloats() > p.q_len * BwdSm90DqColumns(shape)) return;
    if (rule.SliceFloats() > 0) {
      bias_sums = arena->Take<float>(p.batch * plan.kv_tiles * p.heads * rule.SliceFloats());
    }
    if (rule.LeavesLists()) sequences = p.batch;
    const int64_t run_rows = BwdSm90RunRows(shape), runs = (p.q_len + run_rows - 1) / run_rows;
    const int64_t all_runs = p.batch * p.heads * runs, lists = plan.heads * plan.kv_tiles;
    const int64_t entries = sequences * plan.entries;
    sums.runs = static_cast<int32_t>(runs);
    sums.run_rows = static_cast<int32_t>(run_rows);
    sums.dq = arena->Take<float>(all_runs * run_rows * BwdSm90DqColumns(shape));
    const int64_t zeroed_from = arena->bytes();
    sums.copied = arena->Take<uint64_t>(sequences);
    sums.started = arena->Take<int32_t>(1);
    sums.additions = arena->Take<int32_t>(all_runs);
    if (plan.q_blocks > kRanksSharedBlocks) {
      sums.listed = arena->Take<int32_t>(2 * sequences * plan.heads * plan.q_blocks);
    }
    zeroed_words = (arena->bytes() - zeroed_from) / 4;
    sums.lists = arena->Take<int32_t>(2 * sequences * lists);
    sums.indices = arena->Take<int32_t>(entries);
    sums.mask_ids = arena->Take<int32_t>(entries);
    sums.ranks = arena->Take<int32_t>(entries);
  }
};

// What one call needs to reach the device: a stream, and what its kernels are specialised for.
class Launcher {
 public:
  SpattnStatus Init(const SpattnProblem& p, const RuleOnDevice& rule, void* stream) {
    rule_ = rule.params();
    SPATTN_RETURN_IF_ERROR(stream_.Open(stream));
    shape_ = ShapeOf(p, rule.parts(), stream_.arch());
    if (p.dtype == SPATTN_BFLOAT16 && shape_.arch < 80) {
      return Failed(SPATTN_UNSUPPORTED,
                    "bfloat16 needs a GPU of compute capability 8.0, this has %d.%d",
                    shape_.arch / 10, shape_.arch % 10);
    }
    return Ok();
  }

  const Stream& stream() const { return stream_; }

  void UseRule(const RuleOnDevice& rule) { rule_ = rule.params(); }

  template <class Plan>
  void UsePlan(const Plan& plan) {
    spattn::UsePlan(&shape_, plan);
  }

  // The forward kernel also depends on how many keys a q tile lists on average.
  void UseListKeys(int64_t average) { shape_.list_keys = RoundListKeys(average); }

  // Launches attention_fwd_sm90 if it is the kernel of this shape and the driver can make tensor maps
  // of k and v.
  SpattnStatus LaunchFwdSm90(const SpattnCudaFwdParams& params, int64_t q_tiles,
                             bool* is_launched) {
    const SpattnProblem& p = params.problem;
    SpattnCudaMappedFwdParams mapped = {{}, {}, params, 0, 0, 0, 1};
    const auto map = [&](const SpattnTensor& tensor, int dim, SpattnTensorMap* to) {
      return stream_.MakeMap(tensor, p.dtype, p.batch, p.kv_len, p.kv_heads, dim, shape_.block_size,
                             to);
    };
    *is_launched = RunsFwdSm90(shape_) && map(params.k, p.head_dim, &mapped.k) &&
                   map(params.v, p.head_dim_v, &mapped.v);
    if (!*is_launched) {
      shape_.list_keys = kNoMaps;
      return Ok();
    }
    int multiprocessors = 0;
    SPATTN_RETURN_IF_ERROR(stream_.CountMultiprocessors(&multiprocessors));
    // With one CTA for each part, starting and ending them would take 4 to 10 % of the time of long
    // lists. So the first wave has several parts a CTA; the parts that it leaves even out its CTAs.
    const int part = FwdSm90PartQueries(shape_);
    const int64_t heads = p.batch * p.heads, tiles = (q_tiles * shape_.tile_q + part - 1) / part;
    const int64_t parts = heads * tiles, wave_parts = parts * 85 / 100 / multiprocessors;
    mapped.tiles = static_cast<int32_t>(tiles);
    mapped.section_heads = static_cast<int32_t>(std::min(SectionHeads(p), heads));
    if (wave_parts > 1) {
      mapped.wave_ctas = multiprocessors;
      mapped.wave_parts = static_cast<int32_t>(wave_parts);
    }
    const int64_t ctas = parts - mapped.wave_ctas * (mapped.wave_parts - 1);
    return Launch(SPATTN_FWD, mapped, ctas, 1, 1);
  }

  // Whether attention_bwd_sm90 runs, for which this fills in `mapped` but for its call: if all gradients
  // are wanted, `space` is there, and the driver can make tensor maps of q and do.
  bool MapBwdSm90(const SpattnBwdParams& params, const SpattnKvPlan& plan, const DqWorkspace& space,
                  SpattnCudaMappedBwdParams* mapped) const {
    const SpattnProblem& p = params.problem;
    mapped->sums = space.sums;
    const auto map = [&](const SpattnTensor& tensor, int dim, SpattnTensorMap* to) {
      return stream_.MakeMap(tensor, p.dtype, p.batch, p.q_len, p.heads, dim, space.sums.run_rows,
                             to);
    };
    const bool are_all_wanted = params.dq.data != nullptr && params.dk.data != nullptr;
    return are_all_wanted && space.sums.dq != nullptr &&
           plan.kv_tiles * p.kv_heads * p.batch <= kMaxGridX &&
           map(params.q, p.head_dim, &mapped->q) && map(params.dout, p.head_dim_v, &mapped->dout);
  }

  // Launches it, and what comes before and behind it.
  SpattnStatus LaunchBwdSm90(SpattnCudaMappedBwdParams mapped, const SpattnKvPlan& plan,
                             const DqWorkspace& space) {
    const SpattnProblem& p = mapped.call.problem;
    const int64_t ctas = plan.kv_tiles * p.kv_heads * p.batch;
    int multiprocessors = 0;
    SPATTN_RETURN_IF_ERROR(stream_.CountMultiprocessors(&multiprocessors));
    mapped.sums.starts_with_last =
        StartsWithLast(ListQueries(plan), p.q_len, ctas, multiprocessors);
    UseListQueries(&shape_, plan, p.q_len);
    SPATTN_RETURN_IF_ERROR(stream_.Zero(space.sums.copied, space.zeroed_words));
    SPATTN_RETURN_IF_ERROR(Launch(SPATTN_BWD_RANKS, mapped, plan.heads, space.sequences, 1));
    SPATTN_RETURN_IF_ERROR(Launch(SPATTN_BWD, mapped, ctas, 1, 1));
    // attention_bwd_sm90 adds dq up without the factor of dropout, too.
    if (shape_.rule & SPATTN_RULE_DROPOUT) mapped.call.problem.softmax_scale *= rule_.kept_times;
    const int64_t pieces = p.batch * p.heads * p.q_len * (BwdSm90DqColumns(shape_) / 16);
    return Launch(SPATTN_BWD_FINISH, mapped, (pieces + 255) / 256, 1, 1);
  }

  // Launches one CTA for each tile, head and sequence, and several where they share a tile. The
  // tiles of attention_bwd_delta are the rows that a CTA's threads take.
  template <class Params>
  SpattnStatus Launch(SpattnPhase phase, const Params& params, int64_t tiles, int64_t heads,
                      int64_t batch) {
    if (tiles == 0 || batch == 0) return Ok();
    const LoadedKernel* kernel;
    SPATTN_RETURN_IF_ERROR(stream_.Find(shape_, phase, ConfigureFitting, &kernel));
    // A kernel without a rule takes the call alone.
    const SpattnCudaRuled<Params> given = {params, rule_};
    return stream_.Launch(*kernel, &given, tiles * kernel->config.splits, heads, batch);
  }

 private:
  Stream stream_;
  SpattnCudaShape shape_ = {};
  SpattnCudaRule rule_;
};

// The number of CTAs of attention_bwd_delta, in which 2 to 32 lanes read a row in pieces of 16 bytes.
int64_t DeltaTiles(const SpattnProblem& p) {
  const int pieces = p.head_dim_v * ElementSize(p.dtype) / 16;
  int lanes = 2;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  return (p.batch * p.q_len * p.heads * lanes + 255) / 256;
}

int64_t LseElements(const SpattnProblem& p) { return p.batch * p.heads * p.q_len; }

// Tiles of queries that there are; the plan may have more.
int64_t QTiles(const SpattnProblem& p, const SpattnPlan& plan) {
  return CountTiles(p.q_len, p.row_stride, plan.tile_q);
}

// What the passes write between their kernels.
struct Workspace {
  RuleOnDevice rule;
  float *lse_exp, *delta;  // of the backward pass
  DqWorkspace dq;

  SpattnStatus Init(const SpattnFwdParams& params, DeviceArena* arena) {
    return rule.Init(params.problem, params.rule, params.plan, nullptr, nullptr, arena);
  }
  SpattnStatus Init(const SpattnBwdParams& params, const SpattnKvPlan& by_kv, int arch,
                    DeviceArena* arena) {
    lse_exp = arena->Take<float>(LseElements(params.problem));
    delta = arena->Take<float>(LseElements(params.problem));
    SPATTN_RETURN_IF_ERROR(
        rule.Init(params.problem, params.rule, params.plan, &by_kv, params.drelative_bias, arena));
    dq.Init(params.problem, by_kv, rule, arch, arena);
    return Ok();
  }
};

// The architecture that a backward call's workspace is for. Where XLA compiles there may be no device:
// then that for which kernels write the most.
int ArchOfWorkspace() {
  Stream stream;
  return stream.Open(nullptr).code == SPATTN_OK ? stream.arch() : 90;
}

SpattnStatus CheckFwd(const SpattnFwdParams& params, SpattnTilePlan* by_q) {
  SPATTN_RETURN_IF_ERROR(CheckCudaProblem(params.problem));
  return ReadPlan(by_q, params.problem, params.plan);
}

SpattnStatus CheckBwd(const SpattnBwdParams& params, const SpattnKvPlan& plan, SpattnTilePlan* by_q,
                      SpattnTilePlan* by_kv) {
  SPATTN_RETURN_IF_ERROR(CheckCudaProblem(params.problem));
  SPATTN_RETURN_IF_ERROR(ReadPlan(by_q, params.problem, params.plan));
  return ReadKvPlan(by_kv, params.problem, plan);
}

SpattnStatus Forward(const SpattnFwdParams& params, void* stream, void* workspace) {
  const SpattnProblem& problem = params.problem;
  SpattnCudaFwdParams kernel_params = {problem,  {},       params.q,  params.k,
                                       params.v, params.o, params.lse};
  SPATTN_RETURN_IF_ERROR(CheckFwd(params, &kernel_params.by_q));
  SPATTN_RETURN_IF_ERROR(
      CheckTensors(problem, {{"q", params.q}, {"k", params.k}, {"v", params.v}, {"o", params.o}}));
  DeviceArena arena(workspace);
  Workspace space;
  SPATTN_RETURN_IF_ERROR(space.Init(params, &arena));
  Launcher launcher;
  SPATTN_RETURN_IF_ERROR(launcher.Init(problem, space.rule, stream));
  SPATTN_RETURN_IF_ERROR(space.rule.Prepare(launcher.stream(), &kernel_params.by_q, nullptr));
  launcher.UsePlan(params.plan);
  launcher.UseListKeys(params.plan.entries * params.plan.block_size /
                       std::max<int64_t>(params.plan.heads * params.plan.q_tiles, 1));
  const int64_t q_tiles = QTiles(problem, params.plan);
  bool is_launched;
  SPATTN_RETURN_IF_ERROR(launcher.LaunchFwdSm90(kernel_params, q_tiles, &is_launched));
  if (is_launched) return Ok();
  return launcher.Launch(SPATTN_FWD, kernel_params, q_tiles, problem.heads, problem.batch);
}

SpattnStatus Backward(const SpattnBwdParams& params, const SpattnKvPlan& by_kv, void* stream,
                      void* workspace) {
  const SpattnProblem& problem = params.problem;
  SpattnTilePlan tiles_by_q, tiles_by_kv;
  SPATTN_RETURN_IF_ERROR(CheckBwd(params, by_kv, &tiles_by_q, &tiles_by_kv));
  SPATTN_RETURN_IF_ERROR(CheckTensors(problem, {{"q", params.q},
                                                {"k", params.k},
                                                {"v", params.v},
                                                {"o", params.o},
                                                {"do", params.dout},
                                                {"dq", params.dq},
                                                {"dk", params.dk},
                                                {"dv", params.dv}}));
  DeviceArena arena(workspace);
  Workspace space;
  SPATTN_RETURN_IF_ERROR(space.Init(params, by_kv, ArchOfWorkspace(), &arena));
  Launcher launcher;
  SPATTN_RETURN_IF_ERROR(launcher.Init(problem, space.rule, stream));
  SpattnCudaMappedBwdParams mapped = {};
  const bool is_fused = launcher.MapBwdSm90(params, by_kv, space.dq, &mapped);
  if (is_fused && space.dq.bias_sums != nullptr) {
    space.rule.UseSlices(static_cast<int32_t>(by_kv.kv_tiles * problem.batch), space.dq.bias_sums);
    launcher.UseRule(space.rule);
  }
  // attention_bwd_sm90 reads no lists by queries.
  SPATTN_RETURN_IF_ERROR(
      space.rule.Prepare(launcher.stream(), is_fused ? nullptr : &tiles_by_q, &tiles_by_kv));
  const SpattnCudaBwdParams kernel_params = {problem,     tiles_by_q,    tiles_by_kv, params.q,
                                             params.k,    params.v,      params.o,    params.dout,
                                             params.dq,   params.dk,     params.dv,   params.lse,
                                             params.dlse, space.lse_exp, space.delta};
  SPATTN_RETURN_IF_ERROR(
      launcher.Launch(SPATTN_BWD_DELTA, kernel_params, DeltaTiles(problem), 1, 1));
  if (is_fused) {
    mapped.call = kernel_params;
    SPATTN_RETURN_IF_ERROR(launcher.LaunchBwdSm90(mapped, by_kv, space.dq));
    return space.rule.SumSlices(launcher.stream());
  }
  launcher.UsePlan(params.plan);
  if (space.rule.slices() > 0) {
    SPATTN_RETURN_IF_ERROR(
        launcher.Launch(SPATTN_BWD_DQ, kernel_params, space.rule.slices(), problem.heads, 1));
    SPATTN_RETURN_IF_ERROR(space.rule.SumSlices(launcher.stream()));
  } else if (params.dq.data != nullptr) {
    SPATTN_RETURN_IF_ERROR(launcher.Launch(
        SPATTN_BWD_DQ, kernel_params, QTiles(problem, params.plan), problem.heads, problem.batch));
  }
  if (params.dk.data == nullptr) return Ok();
  launcher.UsePlan(by_kv);
  return launcher.Launch(SPATTN_BWD_DKV, kernel_params, by_kv.kv_tiles, problem.kv_heads,
                         problem.batch);
}

}  // namespace
}  // namespace spattn

// ---- C ABI ----

void spattn_cuda_tiles(SpattnCudaShape* shape) { spattn::ChooseTiles(shape); }

void spattn_cuda_kernel(const SpattnCudaShape* shape, int32_t phase, SpattnCudaKernel* kernel) {
  *kernel = spattn::Configure(*shape, static_cast<SpattnPhase>(phase));
}

SpattnStatus spattn_fwd_cuda_workspace(const SpattnFwdParams* params, int64_t* bytes) {
  SpattnTilePlan by_q;
  SPATTN_RETURN_IF_ERROR(spattn::CheckFwd(*params, &by_q));
  spattn::DeviceArena arena(nullptr);
  spattn::Workspace space;
  SPATTN_RETURN_IF_ERROR(space.Init(*params, &arena));
  *bytes = arena.bytes();
  return spattn::Ok();
}

SpattnStatus spattn_fwd_cuda(const SpattnFwdParams* params, void* stream, void* workspace) {
  return spattn::Forward(*params, stream, workspace);
}

SpattnStatus spattn_bwd_cuda_workspace(const SpattnBwdParams* params, const SpattnKvPlan* by_kv,
                                       int64_t* bytes) {
  SpattnTilePlan tiles_by_q, tiles_by_kv;
  SPATTN_RETURN_IF_ERROR(spattn::CheckBwd(*params, *by_kv, &tiles_by_q, &tiles_by_kv));
  spattn::DeviceArena arena(nullptr);
  spattn::Workspace space;
  SPATTN_RETURN_IF_ERROR(space.Init(*params, *by_kv, spattn::ArchOfWorkspace(), &arena));
  *bytes = arena.bytes();
  return spattn::Ok();
}

SpattnStatus spattn_bwd_cuda(const SpattnBwdParams* params, const SpattnKvPlan* by_kv, void* stream,
                             void* workspace) {
  return spattn::Backward(*params, *by_kv, stream, workspace);
}
