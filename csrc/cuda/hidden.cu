#include <utility>

#include "scores.cuh"
#include "ssiuu/dispatch.h"
#include "ssiuu/hidden.h"
#include "ssiuu/kernels.h"
#include "ssiuu/neuron_penalty.h"

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

template <class T, class Act, bool kGated, int kVec>
__global__ void __launch_bounds__(kThreads) hidden_fwd_kernel(HiddenForwardParams p) {
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  const int64_t block = blockIdx.x / stripes * kBlockRows;
  const int64_t col = (blockIdx.x % stripes * kWarp + threadIdx.x) * kVec;
  const int64_t end = min(block + kBlockRows, p.rows);
  for (int64_t row = block + threadIdx.y; row < end && col < p.cols; row += kRowLanes) {
    float x[kVec], up[kVec], h[kVec];
    load(at<T>(p.x, row, p.x_stride, col), x);
    if constexpr (kGated) load(at<T>(p.up, row, p.up_stride, col), up);
#pragma unroll
    for (int i = 0; i < kVec; ++i) h[i] = hidden_value<Act, kGated>(x[i], kGated ? up[i] : 0.0f);
    store(at<T>(p.h, row, p.h_stride, col), h);
  }
}

// kVec columns of one row of the inputs.
template <class T, bool kGated, int kVec>
struct RowInputs {
  float x[kVec], up[kVec], grad_h[kVec];

  __device__ __forceinline__ void load_from(const HiddenBackwardParams& p, int64_t row, int64_t col) {
    load(at<T>(p.x, row, p.x_stride, col), x);
    if constexpr (kGated) load(at<T>(p.up, row, p.up_stride, col), up);
    load(at<T>(p.grad_h, row, p.grad_h_stride, col), grad_h);
  }
};

template <class Act, class T, bool kGated, int kVec>
__device__ __forceinline__ void score_row(const RowInputs<T, kGated, kVec>& in, RunningScores<kVec>& h_scores,
                                          RunningScores<kVec>& x_scores) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const HiddenGrad out = hidden_grad<Act, kGated>(in.x[i], kGated ? in.up[i] : 0.0f, in.grad_h[i]);
    h_scores.update(i, attribution(out.h, in.grad_h[i]));
    x_scores.update(i, attribution(in.x[i], out.grad_x));
  }
}

// Writes the gradients of one row, and its h.
template <class Act, class T, bool kGated, int kVec>
__device__ __forceinline__ void write_row(const HiddenBackwardParams& p, int64_t row, int64_t col,
                                          const RowInputs<T, kGated, kVec>& in) {
  float grad_x[kVec], grad_up[kVec], h[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const HiddenGrad out = hidden_grad<Act, kGated>(in.x[i], kGated ? in.up[i] : 0.0f, in.grad_h[i]);
    grad_x[i] = out.grad_x;
    grad_up[i] = out.grad_up;
    h[i] = out.h;
  }
  store(at<T>(p.grad_x, row, p.grad_x_stride, col), grad_x);
  if constexpr (kGated) store(at<T>(p.grad_up, row, p.grad_up_stride, col), grad_up);
  if (p.h != nullptr) store(at<T>(p.h, row, p.h_stride, col), h);
}

template <class T, class Act, bool kGated, int kVec>
__global__ void __launch_bounds__(kThreads) hidden_bwd_kernel(HiddenBackwardParams p) {
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  const int64_t block = blockIdx.x / stripes * kBlockRows;
  const int64_t col = (blockIdx.x % stripes * kWarp + threadIdx.x) * kVec;
  const int64_t end = min(block + kBlockRows, p.rows);
  for (int64_t row = block + threadIdx.y; row < end && col < p.cols; row += kRowLanes) {
    RowInputs<T, kGated, kVec> in;
    in.load_from(p, row, col);
    write_row<Act>(p, row, col, in);
  }
}

template <class T, class Act, bool kGated, int kVec>
__global__ void __launch_bounds__(kThreads)
    hidden_bwd_scores_kernel(HiddenBackwardParams p, int64_t splits, float* h_partials, float* x_partials) {
  const Tile tile = tile_of_block(p.segments, p.num_segments, p.rows, ceil_div(p.cols, kWarp * kVec), splits);
  const int64_t col = (tile.stripe * kWarp + threadIdx.x) * kVec;
  RunningScores<kVec> h_scores, x_scores;
  h_scores.reset();
  x_scores.reset();
  for (int64_t row = tile.first + threadIdx.y; row < tile.last && col < p.cols; row += kRowLanes) {
    RowInputs<T, kGated, kVec> in;
    in.load_from(p, row, col);
    write_row<Act>(p, row, col, in);
    if (row >= tile.start && row < tile.end) score_row<Act>(in, h_scores, x_scores);
  }
  const ScorePlace place{tile.split * 3 * p.num_segments + tile.segment, p.num_segments, p.cols};
  h_scores.store(h_partials, place, tile.stripe);
  x_scores.store(x_partials, place, tile.stripe);
}

// A block has all rows of one sample: it sums over them first, and rescales grad_h then. Rows of kResident samples stay
// in shared memory in between, as they came. One block a processor is enough for the compiler: asked for no number, it
// spills for the sake of more.
template <class T, class Act, bool kGated, int kVec, bool kResident>
__global__ void __launch_bounds__(kThreads, 1) hidden_bwd_penalty_kernel(HiddenBackwardParams p) {
  constexpr int kStripe = kWarp * kVec;
  constexpr int kTensors = kGated ? 3 : 2;
  const Tile tile = tile_of_block(p.segments, p.num_segments, p.rows, ceil_div(p.cols, kStripe), 1);
  const int64_t col = (tile.stripe * kWarp + threadIdx.x) * kVec;
  Pack<T, kVec>* const kept = shared_memory<Pack<T, kVec>>();  // [rows of the sample, kTensors, kWarp]
  const auto kept_at = [&](int64_t row, int tensor) {
    return kept + ((row - tile.start) * kTensors + tensor) * kWarp + threadIdx.x;
  };
  RunningScores<kVec> h_scores, x_scores;
  h_scores.reset();
  x_scores.reset();
  for (int64_t row = tile.start + threadIdx.y; row < tile.end && col < p.cols; row += kRowLanes) {
    RowInputs<T, kGated, kVec> in;
    in.load_from(p, row, col);
    score_row<Act>(in, h_scores, x_scores);
    if constexpr (kResident) {
      // Each thread reads back what it wrote itself.
      store_shared(kept_at(row, 0), in.x);
      store_shared(kept_at(row, 1), in.grad_h);
      if constexpr (kGated) store_shared(kept_at(row, 2), in.up);
    }
  }
  if (p.h_scores != nullptr) {
    const ScorePlace place{tile.segment, p.num_segments, p.cols};
    const bool empty = tile.start >= tile.end;
    h_scores.store(p.h_scores, place, tile.stripe, empty);
    x_scores.store(p.x_scores, place, tile.stripe, empty);
  }
  __shared__ float factors[kStripe];
  const float h_sum = h_scores.column_sum();
  const int lane = threadIdx.y * kWarp + threadIdx.x;
  if (lane < kStripe) {
    const int64_t own = tile.stripe * kStripe + lane;
    const int64_t bank_row = p.penalty.bank_rows[tile.segment];
    float factor = 1.0f;
    if (own < p.cols && bank_row >= 0) {
      float* bank = p.penalty.bank + bank_row * p.cols + own;
      const NeuronTerm term = neuron_term(h_sum, p.penalty.ratio[tile.segment], *p.penalty.weight, *bank);
      factor = term.factor;
      *bank = term.attribution;
    }
    factors[lane] = factor;
  }
  __syncthreads();
  for (int64_t row = tile.first + threadIdx.y; row < tile.last && col < p.cols; row += kRowLanes) {
    RowInputs<T, kGated, kVec> in;
    const bool scored = row >= tile.start && row < tile.end;
    if (kResident && scored) {
      load(kept_at(row, 0)->data, in.x);
      load(kept_at(row, 1)->data, in.grad_h);
      if constexpr (kGated) load(kept_at(row, 2)->data, in.up);
    } else {
      in.load_from(p, row, col);
    }
    if (scored) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) in.grad_h[i] *= factors[threadIdx.x * kVec + i];
    }
    write_row<Act>(p, row, col, in);
  }
}

struct Parts {
  int64_t splits;
  float* h_partials;  // [splits, 3, B, F]
  float* x_partials;  // [splits, 3, B, F]
  int64_t bytes;
};

Parts split(void* base, int64_t rows, int64_t cols, int64_t num_segments) {
  Workspace workspace(base);
  const int64_t splits = split_count(rows, num_segments);
  float* h_partials = workspace.take<float>(splits * 3 * num_segments * cols);
  float* x_partials = workspace.take<float>(splits * 3 * num_segments * cols);
  return {splits, h_partials, x_partials, workspace.bytes()};
}

template <class T, class Act, bool kGated, int kVec>
void backward(const HiddenBackwardParams& p, void* workspace, cudaStream_t stream) {
  const dim3 threads(kWarp, kRowLanes);
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  if (p.num_segments > 0 && p.penalty.bank != nullptr) {
    const int64_t row_bytes = (kGated ? 3 : 2) * kWarp * kVec * static_cast<int64_t>(sizeof(T));
    const int64_t kept = p.longest * row_bytes;
    const auto resident_kernel = hidden_bwd_penalty_kernel<T, Act, kGated, kVec, true>;
    const bool resident = kept > 0 && kept <= shared_memory_limit(resident_kernel);
    launch_with_shared_memory(resident ? resident_kernel : hidden_bwd_penalty_kernel<T, Act, kGated, kVec, false>,
                              stripes * p.num_segments, threads, resident ? kept : 0, stream, p);
  } else if (p.num_segments > 0 && p.h_scores != nullptr) {
    const Parts parts = split(workspace, p.rows, p.cols, p.num_segments);
    launch(hidden_bwd_scores_kernel<T, Act, kGated, kVec>, stripes * p.num_segments * parts.splits, threads, stream, p,
           parts.splits, parts.h_partials, parts.x_partials);
    launch_finish_scores(p.segments, p.num_segments, parts.h_partials, parts.splits, p.cols, p.h_scores, stream);
    launch_finish_scores(p.segments, p.num_segments, parts.x_partials, parts.splits, p.cols, p.x_scores, stream);
  } else {
    launch(hidden_bwd_kernel<T, Act, kGated, kVec>, ceil_div(p.rows, kBlockRows) * stripes, threads, stream, p);
  }
}

}  // namespace

void hidden_forward(const HiddenForwardParams& p, void*, Stream stream) {
  dispatch_mlp(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    using T = decltype(element);
    using Act = decltype(act);
    constexpr bool kGated = decltype(gated)::value;
    constexpr int kVec = 16 / sizeof(T);
    const bool packed = p.cols % kVec == 0 && aligned(p.x, p.x_stride, sizeof(T), 16) &&
                        aligned(p.up, p.up_stride, sizeof(T), 16) && aligned(p.h, p.h_stride, sizeof(T), 16);
    const int64_t stripes = ceil_div(p.cols, kWarp * (packed ? kVec : 1));
    launch(packed ? hidden_fwd_kernel<T, Act, kGated, kVec> : hidden_fwd_kernel<T, Act, kGated, 1>,
           ceil_div(p.rows, kBlockRows) * stripes, dim3(kWarp, kRowLanes), stream, p);
  });
}

int64_t hidden_backward_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments, bool scores) {
  return scores ? split(nullptr, rows, cols, num_segments).bytes : 0;
}

void hidden_backward(const HiddenBackwardParams& p, void* workspace, Stream stream) {
  dispatch_mlp(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    using T = decltype(element);
    using Act = decltype(act);
    constexpr bool kGated = decltype(gated)::value;
    constexpr int kVec = 16 / sizeof(T);
    bool packed = p.cols % kVec == 0;
    for (const auto& [base, stride] : {std::pair<const void*, int64_t>{p.x, p.x_stride},
                                       {p.up, p.up_stride},
                                       {p.grad_h, p.grad_h_stride},
                                       {p.grad_x, p.grad_x_stride},
                                       {p.grad_up, p.grad_up_stride},
                                       {p.h, p.h_stride}}) {
      packed = packed && aligned(base, stride, sizeof(T), 16);
    }
    packed ? backward<T, Act, kGated, kVec>(p, workspace, stream) : backward<T, Act, kGated, 1>(p, workspace, stream);
  });
}

}  // namespace ssiuu::cuda
