#include "scores.cuh"
#include "ssiuu/dispatch.h"
#include "ssiuu/glu.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cuda {
namespace {

template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t row, int64_t stride, int64_t col) {
  return static_cast<const T*>(base) + row * stride + col;
}

template <class T>
__device__ __forceinline__ T* at(void* base, int64_t row, int64_t stride, int64_t col) {
  return static_cast<T*>(base) + row * stride + col;
}

template <class T, class Act, int kVec>
__global__ void __launch_bounds__(kWarp* kRowLanes) glu_fwd_kernel(GluForwardParams p) {
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  const int64_t row_block = blockIdx.x / stripes;
  const int64_t col = (blockIdx.x % stripes * kWarp + threadIdx.x) * kVec;
  const int64_t block_end = min((row_block + 1) * kBlockRows, p.rows);
  for (int64_t row = row_block * kBlockRows + threadIdx.y; row < block_end && col < p.cols; row += kRowLanes) {
    float gate[kVec], up[kVec], h[kVec];
    load(at<T>(p.gate, row, p.gate_stride, col), gate);
    load(at<T>(p.up, row, p.up_stride, col), up);
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[i] = glu_value<Act>(gate[i], up[i]);
    store(at<T>(p.h, row, p.h_stride, col), h);
  }
}

// The gradients of one row's kVec columns, and their attributions if asked for.
template <class T, class Act, int kVec, bool kScores>
__device__ __forceinline__ void backward_row(const GluBackwardParams& p, int64_t row, int64_t col,
                                             RunningScores<kVec>& h_scores, RunningScores<kVec>& gate_scores) {
  float gate[kVec], up[kVec], grad_h[kVec], grad_gate[kVec], grad_up[kVec], h[kVec];
  load(at<T>(p.gate, row, p.gate_stride, col), gate);
  load(at<T>(p.up, row, p.up_stride, col), up);
  load(at<T>(p.grad_h, row, p.grad_h_stride, col), grad_h);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const GluGrad out = glu_grad<Act>(gate[i], up[i], grad_h[i]);
    grad_gate[i] = out.grad_gate;
    grad_up[i] = out.grad_up;
    h[i] = out.h;
    if constexpr (kScores) {
      h_scores.update(i, attribution(out.h, grad_h[i]));
      gate_scores.update(i, attribution(gate[i], out.grad_gate));
    }
  }
  store(at<T>(p.grad_gate, row, p.grad_gate_stride, col), grad_gate);
  store(at<T>(p.grad_up, row, p.grad_up_stride, col), grad_up);
  if (p.h != nullptr) store(at<T>(p.h, row, p.h_stride, col), h);
}

template <class T, class Act, int kVec, bool kScores>
__global__ void __launch_bounds__(kWarp* kRowLanes)
    glu_bwd_kernel(GluBackwardParams p, ScorePlan plan, float* h_partials, float* gate_partials) {
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  const int64_t row_block = blockIdx.x / stripes;
  const int64_t stripe = blockIdx.x % stripes * kWarp * kVec;
  const int64_t col = stripe + threadIdx.x * kVec;
  const int64_t block_end = min((row_block + 1) * kBlockRows, p.rows);
  for (int64_t row = row_block * kBlockRows; row < block_end;) {
    const Run run = kScores ? next_run(plan, row, block_end) : Run{block_end, -1};
    RunningScores<kVec> h_scores, gate_scores;
    if constexpr (kScores) {
      h_scores.reset();
      gate_scores.reset();
    }
    for (int64_t r = row + threadIdx.y; r < run.end && col < p.cols; r += kRowLanes) {
      backward_row<T, Act, kVec, kScores>(p, r, col, h_scores, gate_scores);
    }
    if (kScores && run.segment >= 0) {
      const int64_t slot = row_block + plan.rank[run.segment];
      h_scores.store(h_partials + slot * 3 * p.cols, stripe, p.cols);
      gate_scores.store(gate_partials + slot * 3 * p.cols, stripe, p.cols);
    }
    row = run.end;
  }
}

struct Parts {
  ScorePlan plan;
  float* h_partials;     // [num_slots, 3, F]
  float* gate_partials;  // [num_slots, 3, F]
  int64_t bytes;
};

Parts split(void* base, const Segment* segments, int64_t num_segments, int64_t rows, int64_t cols) {
  Workspace workspace(base);
  const ScorePlan plan = make_score_plan(workspace, segments, num_segments, rows);
  float* h_partials = workspace.take<float>(plan.num_slots * 3 * cols);
  float* gate_partials = workspace.take<float>(plan.num_slots * 3 * cols);
  return {plan, h_partials, gate_partials, workspace.bytes()};
}

template <class T, class Act, int kVec>
void backward(const GluBackwardParams& p, const Parts& parts, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.rows, kBlockRows) * ceil_div(p.cols, kWarp * kVec);
  const auto kernel = p.h_scores != nullptr ? glu_bwd_kernel<T, Act, kVec, true> : glu_bwd_kernel<T, Act, kVec, false>;
  launch(kernel, blocks, dim3(kWarp, kRowLanes), stream, p, parts.plan, parts.h_partials, parts.gate_partials);
}

template <class T, class Act, int kVec>
void forward(const GluForwardParams& p, cudaStream_t stream) {
  launch(glu_fwd_kernel<T, Act, kVec>, ceil_div(p.rows, kBlockRows) * ceil_div(p.cols, kWarp * kVec),
         dim3(kWarp, kRowLanes), stream, p);
}

}  // namespace

void glu_forward(const GluForwardParams& p, void*, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    const bool packed = p.cols % kVec == 0 && aligned(p.gate, p.gate_stride, sizeof(T), 16) &&
                        aligned(p.up, p.up_stride, sizeof(T), 16) && aligned(p.h, p.h_stride, sizeof(T), 16);
    dispatch_activation(p.activation, [&](auto act) {
      using Act = decltype(act);
      packed ? forward<T, Act, kVec>(p, stream) : forward<T, Act, 1>(p, stream);
    });
  });
}

int64_t glu_backward_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments) {
  return split(nullptr, nullptr, num_segments, rows, cols).bytes;
}

void glu_backward(const GluBackwardParams& p, void* workspace, Stream stream) {
  const bool scores = p.h_scores != nullptr;
  const Parts parts = scores ? split(workspace, p.segments, p.num_segments, p.rows, p.cols) : Parts{};
  if (scores) launch_score_plan(parts.plan, p.rows, stream);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    const bool packed = p.cols % kVec == 0 && aligned(p.gate, p.gate_stride, sizeof(T), 16) &&
                        aligned(p.up, p.up_stride, sizeof(T), 16) &&
                        aligned(p.grad_h, p.grad_h_stride, sizeof(T), 16) &&
                        aligned(p.grad_gate, p.grad_gate_stride, sizeof(T), 16) &&
                        aligned(p.grad_up, p.grad_up_stride, sizeof(T), 16) &&
                        (p.h == nullptr || aligned(p.h, p.h_stride, sizeof(T), 16));
    dispatch_activation(p.activation, [&](auto act) {
      using Act = decltype(act);
      packed ? backward<T, Act, kVec>(p, parts, stream) : backward<T, Act, 1>(p, parts, stream);
    });
  });
  if (scores) {
    launch_finish_scores(parts.plan, parts.h_partials, p.cols, p.h_scores, stream);
    launch_finish_scores(parts.plan, parts.gate_partials, p.cols, p.gate_scores, stream);
  }
}

}  // namespace ssiuu::cuda
