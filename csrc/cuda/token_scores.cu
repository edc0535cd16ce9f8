#include "scores.cuh"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kWarp* kRowLanes)
    token_scores_kernel(TokenScoresParams p, ScorePlan plan, float* partials) {
  const int64_t stripes = ceil_div(p.cols, kWarp * kVec);
  const int64_t row_block = blockIdx.x / stripes;
  const int64_t stripe = blockIdx.x % stripes * kWarp * kVec;
  const int64_t col = stripe + threadIdx.x * kVec;
  const int64_t block_end = min((row_block + 1) * kBlockRows, p.rows);
  for (int64_t row = row_block * kBlockRows; row < block_end;) {
    const Run run = next_run(plan, row, block_end);
    if (run.segment >= 0) {
      RunningScores<kVec> scores;
      scores.reset();
      for (int64_t r = row + threadIdx.y; r < run.end && col < p.cols; r += kRowLanes) {
        float z[kVec], grad_z[kVec];
        load(static_cast<const T*>(p.z) + r * p.z_stride + col, z);
        load(static_cast<const T*>(p.grad_z) + r * p.grad_z_stride + col, grad_z);
#pragma unroll
        for (int i = 0; i < kVec; ++i) scores.update(i, attribution(z[i], grad_z[i]));
      }
      scores.store(partials + (row_block + plan.rank[run.segment]) * 3 * p.cols, stripe, p.cols);
    }
    row = run.end;
  }
}

struct Parts {
  ScorePlan plan;
  float* partials;  // [num_slots, 3, D]
  int64_t bytes;
};

Parts split(void* base, const Segment* segments, int64_t num_segments, int64_t rows, int64_t cols) {
  Workspace workspace(base);
  const ScorePlan plan = make_score_plan(workspace, segments, num_segments, rows);
  float* partials = workspace.take<float>(plan.num_slots * 3 * cols);
  return {plan, partials, workspace.bytes()};
}

template <class T, int kVec>
void run(const TokenScoresParams& p, const Parts& parts, cudaStream_t stream) {
  launch(token_scores_kernel<T, kVec>, ceil_div(p.rows, kBlockRows) * ceil_div(p.cols, kWarp * kVec),
         dim3(kWarp, kRowLanes), stream, p, parts.plan, parts.partials);
}

}  // namespace

int64_t token_scores_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments) {
  return split(nullptr, nullptr, num_segments, rows, cols).bytes;
}

void token_scores(const TokenScoresParams& p, void* workspace, Stream stream) {
  const Parts parts = split(workspace, p.segments, p.num_segments, p.rows, p.cols);
  launch_score_plan(parts.plan, p.rows, stream);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    const bool packed = p.cols % kVec == 0 && aligned(p.z, p.z_stride, sizeof(T), 16) &&
                        aligned(p.grad_z, p.grad_z_stride, sizeof(T), 16);
    packed ? run<T, kVec>(p, parts, stream) : run<T, 1>(p, parts, stream);
  });
  launch_finish_scores(parts.plan, parts.partials, p.cols, p.scores, stream);
}

}  // namespace ssiuu::cuda
