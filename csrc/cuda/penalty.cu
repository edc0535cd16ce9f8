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

// The tensors of one launch, in the kernel's arguments: nothing is copied to the device. 4 KB is what they may take.
struct TensorTable {
  static constexpr int kMax = 48;
  PenaltyTensors tensors[kMax];
  int32_t first_block[kMax + 1];  // the blocks of tensor i start here
  int32_t count;
};

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

// penalty: writes the sum of both gradients to grad.
template <class Param_, class Grad_, class State_>
struct Penalty {
  using Param = Param_;
  using Grad = Grad_;
  using State = State_;

  __device__ Penalty(const PenaltyTensors&, const StepScalars&) {}

  template <int kCount>
  __device__ __forceinline__ void write(const PenaltyTensors& t, int64_t i, float (&)[kCount],
                                        const float (&anchor)[kCount], const float (&grad_sum)[kCount]) const {
    store(static_cast<State*>(t.prev_attribution) + i, anchor);
    store(static_cast<Grad*>(t.grad) + i, grad_sum);
  }
};

// penalty_adamw: feeds the sum of both gradients to AdamW.
template <class Param_, class Grad_, class State_, bool kStochastic>
struct PenaltyAdamW {
  using Param = Param_;
  using Grad = Grad_;
  using State = State_;
  AdamWStep adamw;
  uint32_t key;

  __device__ PenaltyAdamW(const PenaltyTensors& t, const StepScalars& s)
      : adamw(s), key(rounding_key(t.seed, static_cast<uint32_t>(s.step))) {}

  template <int kCount>
  __device__ __forceinline__ void write(const PenaltyTensors& t, int64_t i, float (&w)[kCount],
                                        const float (&anchor)[kCount], const float (&grad_sum)[kCount]) const {
    float m[kCount], v[kCount];
    load(static_cast<const State*>(t.exp_avg) + i, m);
    load(static_cast<const State*>(t.exp_avg_sq) + i, v);
    Pack<Param, kCount> params;
    Pack<State, kCount> anchors, means, squares;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      adamw_update(w[k], m[k], v[k], grad_sum[k], adamw);
      store_update<kStochastic>(params.data[k], anchors.data[k], means.data[k], squares.data[k], w[k], anchor[k], m[k],
                                v[k], key, i + k);
    }
    store(static_cast<Param*>(t.param) + i, params);
    store(static_cast<State*>(t.prev_attribution) + i, anchors);
    store(static_cast<State*>(t.exp_avg) + i, means);
    store(static_cast<State*>(t.exp_avg_sq) + i, squares);
  }
};

template <int kCount, class Op>
__device__ __forceinline__ void penalise(const Op& op, const PenaltyTensors& t, const PenaltyStep& step, bool keep,
                                         int64_t i, PenaltyStats& stats) {
  float w[kCount], loss_grad[kCount], target_grad[kCount], anchor[kCount], grad_sum[kCount];
  load(static_cast<const typename Op::Param*>(t.param) + i, w);
  load(static_cast<const typename Op::Grad*>(t.grad) + i, loss_grad);
  load(static_cast<const typename Op::Grad*>(t.target_grad) + i, target_grad);
  load(static_cast<const typename Op::State*>(t.prev_attribution) + i, anchor);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const PenaltyTerm term = penalty_term(w[k], loss_grad[k], target_grad[k], anchor[k], step);
    anchor[k] = next_anchor(term.attribution, anchor[k], keep);
    grad_sum[k] = loss_grad[k] + term.grad;
    stats.add({square(term.growth), square(term.grad), square(loss_grad[k]), term.outweighs, term.negative});
  }
  op.write(t, i, w, anchor, grad_sum);
}

template <bool kPacked, class Op>
__global__ void __launch_bounds__(kThreads, kPacked ? 2 : 1)
    penalty_kernel(TensorTable table, StepScalars host_scalars, const StepScalars* device_scalars, bool keep_anchor,
                   PenaltyStats* partials) {
  constexpr int kCount = kPacked ? kVec : 1;
  int low = 0;
  for (int high = table.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= static_cast<int32_t>(blockIdx.x) ? low : high) = middle;
  }
  const PenaltyTensors& t = table.tensors[low];
  const StepScalars scalars = device_scalars != nullptr ? *device_scalars : host_scalars;
  const PenaltyStep step(scalars);
  const bool keep = keeps_anchor(keep_anchor, scalars);
  const Op op(t, scalars);
  const int64_t begin = (blockIdx.x - table.first_block[low]) * kChunk;
  const int64_t end = min(begin + kChunk, t.n);
  PenaltyStats stats{};
#pragma unroll 1  // one step has up to 96 bytes of loads in flight a thread in bfloat16, 192 in float32
  for (int64_t i = begin + threadIdx.x * kCount; i < end; i += kThreads * kCount) {
    if (!kPacked || i + kCount <= end) {
      penalise<kCount>(op, t, step, keep, i, stats);
    } else {
      for (int64_t k = i; k < end; ++k) penalise<1>(op, t, step, keep, k, stats);
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

bool packs(const void* base, DType dtype) {
  const int64_t size = dtype == DType::kFloat32 ? sizeof(float) : sizeof(BFloat16);
  return aligned(base, 0, size, std::min<int64_t>(16, kVec * size));
}

bool packs(const PenaltyTensors& t, const PenaltyParams& p) {
  return packs(t.param, p.param_dtype) && packs(t.grad, p.grad_dtype) && packs(t.target_grad, p.grad_dtype) &&
         packs(t.prev_attribution, p.state_dtype) && packs(t.exp_avg, p.state_dtype) &&
         packs(t.exp_avg_sq, p.state_dtype);
}

// Launches over as many tensors as one table takes, one statistics entry a block.
template <class Op>
void run(const PenaltyParams& p, void* workspace, cudaStream_t stream) {
  auto* partials = static_cast<PenaltyStats*>(workspace);
  int64_t total = 0;
  for (size_t next = 0; next < p.tensors.size();) {
    TensorTable table{};
    bool packed = true;
    for (; next < p.tensors.size() && table.count < TensorTable::kMax; ++next) {
      const PenaltyTensors& t = p.tensors[next];
      const int64_t blocks = ceil_div(t.n, kChunk);
      if (blocks == 0) continue;
      table.tensors[table.count] = t;
      table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<int32_t>(blocks);
      ++table.count;
      packed = packed && packs(t, p);
    }
    const int64_t blocks = table.first_block[table.count];
    launch(packed ? penalty_kernel<true, Op> : penalty_kernel<false, Op>, blocks, kThreads, stream, table, p.scalars,
           p.device_scalars, p.keep_anchor, partials + total);
    total += blocks;
  }
  launch(sum_stats_kernel, 1, kThreads, stream, partials, total, p.stats);
}

}  // namespace

int64_t penalty_workspace_bytes(const std::vector<int64_t>& sizes) {
  int64_t blocks = 0;
  for (const int64_t n : sizes) blocks += ceil_div(n, kChunk);
  return blocks * static_cast<int64_t>(sizeof(PenaltyStats));
}

void penalty(const PenaltyParams& p, void* workspace, Stream stream) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    run<Penalty<decltype(param_t), decltype(grad_t), decltype(state_t)>>(p, workspace, stream);
  });
}

void penalty_adamw(const PenaltyParams& p, void* workspace, Stream stream) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    p.stochastic ? run<PenaltyAdamW<Param, Grad, State, true>>(p, workspace, stream)
                 : run<PenaltyAdamW<Param, Grad, State, false>>(p, workspace, stream);
  });
}

}  // namespace ssiuu::cuda
