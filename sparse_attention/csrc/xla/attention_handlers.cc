// attention_handlers.cc — what XLA calls when a compiled graph runs: handlers of typed FFI.
//
// A handler checks all shapes and attributes again, and the core checks the plan. What is wrong comes
// back as a status of XLA: no failure in a handler ends the process.
#include <string.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "abi/own_integers.h"
#include "tf/attention_call.h"
#include "xla/ffi/api/ffi.h"
#include "xla/targets.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // of libtensorflow_cc, declared in headers that do not mix
}  // namespace xla::ffi

namespace spattn {
namespace {

namespace ffi = xla::ffi;

ffi::Error ToError(const SpattnStatus& status) {
  const auto code = status.code == SPATTN_OK            ? ffi::ErrorCode::kOk
                    : status.code == SPATTN_UNSUPPORTED ? ffi::ErrorCode::kUnimplemented
                    : status.code == SPATTN_INTERNAL    ? ffi::ErrorCode::kInternal
                                                        : ffi::ErrorCode::kInvalidArgument;
  return status.code == SPATTN_OK ? ffi::Error::Success() : ffi::Error(code, status.message);
}

// ---- buffers ----

// What XLA hands over: the inputs of the op, then the results.
struct Buffers {
  static constexpr int kMost = kPlanOfGrad + kPlanInputs + kRuleInputs;
  Array inputs[kMost], results[kQkvInputs + 2];

  SpattnStatus Read(const ffi::RemainingArgs& args, int inputs_expected,
                    const ffi::RemainingRets& rets, int results_expected) {
    SPATTN_RETURN_IF(static_cast<int>(args.size()) != inputs_expected ||
                         static_cast<int>(rets.size()) != results_expected,
                     "the custom call must have %d inputs and %d results, got %d and %d",
                     inputs_expected, results_expected, static_cast<int>(args.size()),
                     static_cast<int>(rets.size()));
    for (int i = 0; i < inputs_expected; ++i) {
      const auto buffer = args.get<ffi::AnyBuffer>(i);
      SPATTN_RETURN_IF(!buffer.has_value(), "input %d of the custom call is no buffer", i);
      inputs[i] = ArrayOf(*buffer);
    }
    for (int i = 0; i < results_expected; ++i) {
      auto buffer = rets.get<ffi::AnyBuffer>(i);
      SPATTN_RETURN_IF(!buffer.has_value(), "result %d of the custom call is no buffer", i);
      results[i] = ArrayOf(**buffer);
    }
    return Ok();
  }

 private:
  static Array ArrayOf(const ffi::AnyBuffer& buffer) {
    const auto dims = buffer.dimensions();
    return Array(buffer.untyped_data(), static_cast<int64_t>(dims.size()),
                 [&](int i) { return dims[i]; });
  }
};

// ---- host ----

// XLA's pool gives no way to wait, and the thread that waits may be one of its own. So the caller
// works as well, on whatever no thread of the pool has taken yet: all is done even if none comes.
struct Work {
  void (*work)(void*, int32_t);
  void* arg;
  int32_t workers;
  std::atomic<int32_t> next{0};
  std::mutex mutex;
  std::condition_variable is_done;
  int32_t done = 0;

  void Take() {
    int32_t taken = 0;
    for (int32_t w; (w = next.fetch_add(1)) < workers; ++taken) work(arg, w);
    if (taken == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if ((done += taken) == workers) is_done.notify_all();
  }
};

void RunInPool(void* pool, int32_t workers, void (*work)(void*, int32_t), void* arg) {
  const auto shared = std::make_shared<Work>();  // a thread may come when the caller has gone
  shared->work = work;
  shared->arg = arg;
  shared->workers = workers;
  for (int32_t i = 1; i < workers; ++i) {
    static_cast<ffi::ThreadPool*>(pool)->Schedule([shared] { shared->Take(); });
  }
  shared->Take();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->is_done.wait(lock, [&] { return shared->done == workers; });
}

// Memory of the host, which FFI has none of to give: null where there is none.
struct Memory {
  static constexpr std::align_val_t kAlignment{64};
  void* const data;

  explicit Memory(int64_t bytes)
      : data(::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow)) {}
  Memory(const Memory&) = delete;
  ~Memory() { ::operator delete(data, kAlignment); }
};

SpattnStatus NoMemory(int64_t bytes) {
  return Failed(SPATTN_INTERNAL, "no memory for a workspace of %lld bytes", (LongLong)bytes);
}

template <class Params>
SpattnStatus CallOnHost(ffi::ThreadPool* pool, Params params,
                        SpattnStatus (*workspace_bytes)(const Params*, int32_t, int64_t*),
                        SpattnStatus (*call)(const Params*, const SpattnThreads*, void*)) {
  const int64_t integers_bytes = CountIntegers(params) * static_cast<int64_t>(sizeof(int32_t));
  const Memory integers(integers_bytes);
  if (integers.data == nullptr) return NoMemory(integers_bytes);
  OwnIntegers(&params, static_cast<int32_t*>(integers.data));
  const int64_t size = pool->num_threads();
  const SpattnThreads threads = {static_cast<int32_t>(size < 1 ? 1 : size), pool, RunInPool};
  int64_t bytes = 0;
  SPATTN_RETURN_IF_ERROR(workspace_bytes(&params, threads.workers, &bytes));
  const Memory workspace(bytes);
  if (workspace.data == nullptr) return NoMemory(bytes);
  return call(&params, &threads, workspace.data);
}

// ---- both calls on both platforms ----

struct Host {
  ffi::ThreadPool* pool;

  SpattnStatus Run(const SpattnFwdParams& params, const Array&) const {
    return CallOnHost(pool, params, spattn_fwd_cpu_workspace, spattn_fwd_cpu);
  }
  SpattnStatus Run(const SpattnBwdParams& params, const CallAttributes&, const Array*,
                   const Array&) const {
    return CallOnHost(pool, params, spattn_bwd_cpu_workspace, spattn_bwd_cpu);
  }
};

// XLA has made the device's context current. The workspace is a result of the custom call, so that it
// is part of XLA's plan of its memory.
struct Cuda {
  void* const stream;

  explicit Cuda(void* stream) : stream(stream) {}

  SpattnStatus Run(const SpattnFwdParams& params, const Array& workspace) const {
    int64_t bytes = 0;
    SPATTN_RETURN_IF_ERROR(spattn_fwd_cuda_workspace(&params, &bytes));
    SPATTN_RETURN_IF_ERROR(CheckWorkspace(workspace, bytes));
    return spattn_fwd_cuda(&params, stream, workspace.data);
  }
  SpattnStatus Run(const SpattnBwdParams& params, const CallAttributes& attributes,
                   const Array* plan_inputs, const Array& workspace) const {
    SpattnKvPlan by_kv = {};
    SPATTN_RETURN_IF_ERROR(ReadByKv(attributes, params.problem, plan_inputs, &by_kv));
    int64_t bytes = 0;
    SPATTN_RETURN_IF_ERROR(spattn_bwd_cuda_workspace(&params, &by_kv, &bytes));
    SPATTN_RETURN_IF_ERROR(CheckWorkspace(workspace, bytes));
    return spattn_bwd_cuda(&params, &by_kv, stream, workspace.data);
  }

 private:
  static SpattnStatus CheckWorkspace(const Array& workspace, int64_t bytes) {
    SPATTN_RETURN_IF(workspace.rank != 1 || workspace.dims[0] < bytes,
                     "the workspace must have %lld bytes", (LongLong)bytes);
    return Ok();
  }
};

template <class Platform>
SpattnStatus RunFwd(const Platform& platform, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets, const CallAttributes& attributes) {
  Buffers buffers;
  SPATTN_RETURN_IF_ERROR(
      buffers.Read(args, kPlanOfFwd + kPlanInputs + attributes.CountRuleInputs(), rets, 3));
  SpattnFwdParams params = {};
  SPATTN_RETURN_IF_ERROR(ReadFwd(attributes, buffers.inputs, &params));
  const SpattnProblem& p = params.problem;
  const Array &o = buffers.results[0], &lse = buffers.results[1];
  SPATTN_RETURN_IF_ERROR(CheckArray("o", o, {p.batch, p.q_len, attributes.heads * p.head_dim_v}));
  SPATTN_RETURN_IF_ERROR(CheckArray("lse", lse, {p.batch, attributes.heads, p.q_len}));
  params.o = View(o, attributes.heads);
  params.lse = static_cast<float*>(lse.data);
  return platform.Run(params, buffers.results[2]);
}

template <class Platform>
SpattnStatus RunBwd(const Platform& platform, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets, const CallAttributes& attributes) {
  Buffers buffers;
  SPATTN_RETURN_IF_ERROR(buffers.Read(
      args, kPlanOfGrad + kPlanInputs + attributes.CountRuleInputs(), rets, kQkvInputs + 2));
  SpattnBwdParams params = {};
  SPATTN_RETURN_IF_ERROR(ReadBwd(attributes, buffers.inputs, &params));
  const Array* gradients = buffers.results;
  for (const int i : {kQ, kK, kV}) {
    const int64_t* dims = buffers.inputs[i].dims;
    SPATTN_RETURN_IF_ERROR(CheckArray("a gradient", gradients[i], {dims[0], dims[1], dims[2]}));
  }
  params.dq = View(gradients[kQ], attributes.heads);
  params.dk = View(gradients[kK], attributes.kv_heads);
  params.dv = View(gradients[kV], attributes.kv_heads);
  const SpattnScoreRule& rule = params.rule;
  if (rule.relative_bias) {
    SPATTN_RETURN_IF_ERROR(CheckArray("drelative_bias", gradients[kQkvInputs],
                                      {rule.bias_heads, 2 * rule.bias_reach - 1}));
    params.drelative_bias = static_cast<float*>(gradients[kQkvInputs].data);
  }
  return platform.Run(params, attributes, buffers.inputs + kPlanOfGrad,
                      buffers.results[kQkvInputs + 1]);
}

// ---- handlers ----

// A float travels as its bits: as text it might not come back the same.
CallAttributes Attributes(int64_t heads, int64_t kv_heads, int64_t row_stride, int64_t tile_q,
                          int64_t block_size, int64_t tile_kv, int64_t scale_bits, int64_t dtype,
                          int64_t allow_tf32, int64_t softcap_bits, int64_t dropout_bits,
                          int64_t q_offset, int64_t rule_inputs, int64_t plan_q_len,
                          int64_t plan_kv_len) {
  const auto as_float = [](int64_t value) {
    const auto bits = static_cast<uint32_t>(value);
    float number;
    memcpy(&number, &bits, sizeof(bits));
    return number;
  };
  CallAttributes a = {};
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.row_stride = row_stride;
  a.tile_q = tile_q;
  a.block_size = block_size;
  a.tile_kv = tile_kv;
  a.softmax_scale = as_float(scale_bits);
  a.logit_softcap = as_float(softcap_bits);
  a.dropout_rate = as_float(dropout_bits);
  a.q_offset = q_offset;
  a.plan_q_len = plan_q_len;
  a.plan_kv_len = plan_kv_len;
  a.rule_inputs = rule_inputs & ((1 << kRuleInputs) - 1);
  a.dtype = static_cast<int32_t>(dtype);
  a.allow_tf32 = allow_tf32 != 0;
  return a;
}

#define SPATTN_BIND(CONTEXT)         \
  ffi::Ffi::Bind()                   \
      .Ctx<CONTEXT>()                \
      .RemainingArgs()               \
      .RemainingRets()               \
      .Attr<int64_t>("heads")        \
      .Attr<int64_t>("kv_heads")     \
      .Attr<int64_t>("row_stride")   \
      .Attr<int64_t>("tile_q")       \
      .Attr<int64_t>("block_size")   \
      .Attr<int64_t>("tile_kv")      \
      .Attr<int64_t>("scale_bits")   \
      .Attr<int64_t>("dtype")        \
      .Attr<int64_t>("allow_tf32")   \
      .Attr<int64_t>("softcap_bits") \
      .Attr<int64_t>("dropout_bits") \
      .Attr<int64_t>("q_offset")     \
      .Attr<int64_t>("rule_inputs")  \
      .Attr<int64_t>("plan_q_len")   \
      .Attr<int64_t>("plan_kv_len")

template <class... Values>
ffi::Error FwdOnHost(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     Values... values) {
  return ToError(RunFwd(Host{&pool}, args, rets, Attributes(values...)));
}

template <class... Values>
ffi::Error BwdOnHost(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     Values... values) {
  return ToError(RunBwd(Host{&pool}, args, rets, Attributes(values...)));
}

template <class... Values>
ffi::Error FwdOnCuda(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     Values... values) {
  return ToError(RunFwd(Cuda{stream}, args, rets, Attributes(values...)));
}

template <class... Values>
ffi::Error BwdOnCuda(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     Values... values) {
  return ToError(RunBwd(Cuda{stream}, args, rets, Attributes(values...)));
}

#define SPATTN_FOUR_INT64 int64_t, int64_t, int64_t, int64_t
#define SPATTN_HANDLER(Name, CONTEXT, TRAITS)                                                \
  XLA_FFI_Error* Name##Handler(XLA_FFI_CallFrame* frame) {                                   \
    static const auto* handler = SPATTN_BIND(CONTEXT)                                        \
                                     .To(Name<SPATTN_FOUR_INT64, SPATTN_FOUR_INT64,          \
                                              SPATTN_FOUR_INT64, int64_t, int64_t, int64_t>, \
                                         TRAITS)                                             \
                                     .release();                                             \
    return handler->Call(frame);                                                             \
  }
SPATTN_HANDLER(FwdOnHost, ffi::ThreadPool, {})
SPATTN_HANDLER(BwdOnHost, ffi::ThreadPool, {})
// XLA may record these calls into a command buffer, which is a CUDA graph: all that they do on the
// device goes through the stream, with memory of XLA's plan, and they wait for nothing.
SPATTN_HANDLER(FwdOnCuda, ffi::PlatformStream<void*>, {ffi::Traits::kCmdBufferCompatible})
SPATTN_HANDLER(BwdOnCuda, ffi::PlatformStream<void*>, {ffi::Traits::kCmdBufferCompatible})

constexpr XLA_FFI_Handler_Traits kRecordable = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kFwdTarget, "Host", FwdOnHostHandler);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kBwdTarget, "Host", BwdOnHostHandler);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kFwdTarget, "CUDA", FwdOnCudaHandler, kRecordable);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kBwdTarget, "CUDA", BwdOnCudaHandler, kRecordable);

}  // namespace
}  // namespace spattn
