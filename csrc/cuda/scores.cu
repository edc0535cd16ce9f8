#include "scores.cuh"

namespace ssiuu::cuda {
namespace {

constexpr int kThreads = 256;

// One block a segment.
__global__ void __launch_bounds__(kThreads) score_plan_kernel(ScorePlan plan) {
  const Segment segment = plan.segments[blockIdx.x];
  for (int64_t row = segment.start + threadIdx.x; row < segment.end; row += kThreads) {
    plan.row_segment[row] = static_cast<int32_t>(blockIdx.x);
  }
  __shared__ int32_t before;
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  int32_t mine = 0;
  for (int64_t b = threadIdx.x; b < plan.num_segments; b += kThreads) {
    const Segment other = plan.segments[b];
    mine += other.start < other.end && other.start < segment.start;
  }
  atomicAdd(&before, mine);
  __syncthreads();
  if (threadIdx.x == 0) plan.rank[blockIdx.x] = before;
}

// One thread a column of a segment.
__global__ void __launch_bounds__(kThreads)
    finish_scores_kernel(ScorePlan plan, const float* partials, int64_t cols, float* scores) {
  const int64_t stripes = ceil_div(cols, kThreads);
  const int64_t b = blockIdx.x / stripes;
  const int64_t col = blockIdx.x % stripes * kThreads + threadIdx.x;
  if (col >= cols) return;
  const Segment segment = plan.segments[b];
  float result[3] = {0.0f, 0.0f, 0.0f};
  if (segment.start < segment.end) {
    const int64_t last = (segment.end - 1) / kBlockRows + plan.rank[b];
    int64_t slot = segment.start / kBlockRows + plan.rank[b];
    const float* partial = partials + slot * 3 * cols + col;
    for (int s = 0; s < 3; ++s) result[s] = partial[s * cols];
    for (++slot; slot <= last; ++slot) {
      partial += 3 * cols;
      result[0] = running_max(result[0], partial[0]);
      result[1] = running_min(result[1], partial[cols]);
      result[2] += partial[2 * cols];
    }
  }
  for (int s = 0; s < 3; ++s) scores[(s * plan.num_segments + b) * cols + col] = result[s];
}

}  // namespace

ScorePlan make_score_plan(Workspace& workspace, const Segment* segments, int64_t num_segments, int64_t rows) {
  return {segments, workspace.take<int32_t>(rows), workspace.take<int32_t>(num_segments), num_segments,
          ceil_div(rows, kBlockRows) + num_segments};
}

void launch_score_plan(const ScorePlan& plan, int64_t rows, cudaStream_t stream) {
  check(cudaMemsetAsync(plan.row_segment, 0xff, rows * sizeof(int32_t), stream));
  launch(score_plan_kernel, plan.num_segments, kThreads, stream, plan);
}

void launch_finish_scores(const ScorePlan& plan, const float* partials, int64_t cols, float* scores,
                          cudaStream_t stream) {
  launch(finish_scores_kernel, plan.num_segments * ceil_div(cols, kThreads), kThreads, stream, plan, partials, cols,
         scores);
}

}  // namespace ssiuu::cuda
