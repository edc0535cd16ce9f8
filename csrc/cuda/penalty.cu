#include "common.cuh"
#include "ssiuu/adamw.h"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"
#include "ssiuu/penalty.h"

namespace ssiuu::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVec = 8;                                   // scalars that a thread takes at once
constexpr int64_t kChunk = int64_t{4} * kThreads * kVec;  // scalars of one block

// Sum over the block, in thread 0.
__device__ PenaltyStats block_sum(PenaltyStats stats) {
  __shared__ PenaltyStats warps[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    stats.add({__shfl_down_sync(0xffffffffu, stats.value, offset),
               __shfl_down_sync(0xffffffffu, stats.penalty_grad_square, offset),
               __shfl_down_sync(0xffffffffu, stats.loss_grad_square, offset),
               __shfl_down_sync(0xffffffffu, stats.outweighed, offset),
               __shfl_down_sync(0xffffffffu, stats.negative, offset)});
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = stats;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) stats.add(warps[w]);
  }
  return stats;
}

// penalty_ : writes the sum of both gradients to grad.
template <class Param, class Grad, class State>
struct PenaltyOp {
  const Param* param;       // [N]
  Grad* grad;               // [N]
  const Grad* target_grad;  // [N]
  State* prev_attribution;  // [N]
  PenaltyStep step;

  template <int kCount>
  __device__ __forceinline__ void write(int64_t i, float (&)[kCount], const float (&grad_sum)[kCount]) const {
    store(grad + i, grad_sum);
  }
};

// penalty_adamw_ : feeds the sum of both gradients to AdamW.
template <class Param, class Grad, class State>
struct PenaltyAdamWOp {
  Param* param;             // [N]
  const Grad* grad;         // [N]
  const Grad* target_grad;  // [N]
  State* prev_attribution;  // [N]
  PenaltyStep step;
  State* exp_avg;     // [N]
  State* exp_avg_sq;  // [N]
  AdamWStep adamw;

  template <int kCount>
  __device__ __forceinline__ void write(int64_t i, float (&w)[kCount], const float (&grad_sum)[kCount]) const {
    float m[kCount], v[kCount];
    load(exp_avg + i, m);
    load(exp_avg_sq + i, v);
#pragma unroll
    for (int k = 0; k < kCount; ++k) adamw_update(w[k], m[k], v[k], grad_sum[k], adamw);
    store(param + i, w);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
};

template <int kCount, class Op>
__device__ __forceinline__ void penalise(const Op& op, int64_t i, PenaltyStats& stats) {
  float w[kCount], loss_grad[kCount], target_grad[kCount], attribution[kCount], grad_sum[kCount];
  load(op.param + i, w);
  load(op.grad + i, loss_grad);
  load(op.target_grad + i, target_grad);
  load(op.prev_attribution + i, attribution);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const PenaltyTerm term = penalty_term(w[k], loss_grad[k], target_grad[k], attribution[k], op.step);
    attribution[k] = term.attribution;
    grad_sum[k] = loss_grad[k] + term.grad;
    stats.add({square(term.growth), square(term.grad), square(loss_grad[k]), term.outweighs, term.negative});
  }
  store(op.prev_attribution + i, attribution);
  op.write(i, w, grad_sum);
}

template <bool kPacked, class Op>
__global__ void __launch_bounds__(kThreads) penalty_kernel(Op op, int64_t n, PenaltyStats* partials) {
  constexpr int kCount = kPacked ? kVec : 1;
  const int64_t end = min((blockIdx.x + int64_t{1}) * kChunk, n);
  PenaltyStats stats{};
  for (int64_t i = blockIdx.x * kChunk + threadIdx.x * kCount; i < end; i += kThreads * kCount) {
    if (i + kCount <= end) {
      penalise<kCount>(op, i, stats);
    } else {
      for (int64_t k = i; k < end; ++k) penalise<1>(op, k, stats);
    }
  }
  stats = block_sum(stats);
  if (threadIdx.x == 0) partials[blockIdx.x] = stats;
}

__global__ void __launch_bounds__(kThreads) sum_stats_kernel(const PenaltyStats* partials, int64_t count, double* out) {
  PenaltyStats stats{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) stats.add(partials[i]);
  stats = block_sum(stats);
  if (threadIdx.x == 0) *reinterpret_cast<PenaltyStats*>(out) = stats;
}

template <class Op>
void run(const Op& op, int64_t n, bool packed, double* stats, void* workspace, cudaStream_t stream) {
  auto* partials = static_cast<PenaltyStats*>(workspace);
  const int64_t blocks = ceil_div(n, kChunk);
  launch(packed ? penalty_kernel<true, Op> : penalty_kernel<false, Op>, blocks, kThreads, stream, op, n, partials);
  launch(sum_stats_kernel, 1, kThreads, stream, partials, blocks, stats);
}

template <class T>
bool packs(const T* base) {
  return aligned(base, 0, sizeof(T), alignof(Pack<T, kVec>));
}

}  // namespace

int64_t penalty_workspace_bytes(int64_t n) { return ceil_div(n, kChunk) * static_cast<int64_t>(sizeof(PenaltyStats)); }

void penalty(const PenaltyParams& p, void* workspace, Stream stream) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    const PenaltyOp<Param, Grad, State> op{static_cast<const Param*>(p.param), static_cast<Grad*>(p.grad),
                                           static_cast<const Grad*>(p.target_grad),
                                           static_cast<State*>(p.prev_attribution), PenaltyStep(p.weight, p.step)};
    const bool packed = packs(op.param) && packs(op.grad) && packs(op.target_grad) && packs(op.prev_attribution);
    run(op, p.n, packed, p.stats, workspace, stream);
  });
}

void penalty_adamw(const PenaltyAdamWParams& p, void* workspace, Stream stream) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    const PenaltyAdamWOp<Param, Grad, State> op{static_cast<Param*>(p.param),
                                                static_cast<const Grad*>(p.grad),
                                                static_cast<const Grad*>(p.target_grad),
                                                static_cast<State*>(p.prev_attribution),
                                                PenaltyStep(p.weight, p.step),
                                                static_cast<State*>(p.exp_avg),
                                                static_cast<State*>(p.exp_avg_sq),
                                                AdamWStep(p.step, p.lr, p.beta1, p.beta2, p.eps, p.weight_decay)};
    const bool packed = packs(op.param) && packs(op.grad) && packs(op.target_grad) && packs(op.prev_attribution) &&
                        packs(op.exp_avg) && packs(op.exp_avg_sq);
    run(op, p.n, packed, p.stats, workspace, stream);
  });
}

}  // namespace ssiuu::cuda
