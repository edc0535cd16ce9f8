#include "scores.cuh"

namespace ssiuu::cuda {
namespace {

// One thread a column of a segment.
__global__ void __launch_bounds__(kThreads)
    finish_scores_kernel(const Segment* segments, int64_t num_segments, const float* partials, int64_t splits,
                         int64_t cols, float* scores) {
  const int64_t stripes = ceil_div(cols, kThreads);
  const int64_t b = blockIdx.x / stripes;
  const int64_t col = blockIdx.x % stripes * kThreads + threadIdx.x;
  if (col >= cols) return;
  const int64_t plane = num_segments * cols;
  float result[3] = {-INFINITY, INFINITY, 0.0f};
  for (int64_t split = 0; split < splits; ++split) {
    const float* partial = partials + split * 3 * plane + b * cols + col;
    result[0] = running_max(result[0], partial[0]);
    result[1] = running_min(result[1], partial[plane]);
    result[2] += partial[2 * plane];
  }
  const bool empty = segments[b].start >= segments[b].end;
  for (int s = 0; s < 3; ++s) scores[s * plane + b * cols + col] = empty ? 0.0f : result[s];
}

}  // namespace

void launch_finish_scores(const Segment* segments, int64_t num_segments, const float* partials, int64_t splits,
                          int64_t cols, float* scores, cudaStream_t stream) {
  launch(finish_scores_kernel, num_segments * ceil_div(cols, kThreads), kThreads, stream, segments, num_segments,
         partials, splits, cols, scores);
}

}  // namespace ssiuu::cuda
