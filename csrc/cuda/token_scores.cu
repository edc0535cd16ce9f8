#include "scores.cuh"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) token_scores_kernel(TokenScoresParams p, int64_t splits, float* partials) {
  const Tile tile = tile_of_block(p.segments, p.num_segments, p.rows, ceil_div(p.cols, kWarp * kVec), splits);
  const int64_t col = (tile.stripe * kWarp + threadIdx.x) * kVec;
  RunningScores<kVec> scores;
  scores.reset();
  const int64_t end = min(tile.last, tile.end);
  for (int64_t row = max(tile.first, tile.start) + threadIdx.y; row < end && col < p.cols; row += kRowLanes) {
    float z[kVec], grad_z[kVec];
    load(static_cast<const T*>(p.z) + row * p.z_stride + col, z);
    load(static_cast<const T*>(p.grad_z) + row * p.grad_z_stride + col, grad_z);
#pragma unroll
    for (int i = 0; i < kVec; ++i) scores.update(i, attribution(z[i], grad_z[i]));
  }
  scores.store(partials, {tile.split * 3 * p.num_segments + tile.segment, p.num_segments, p.cols}, tile.stripe);
}

}  // namespace

int64_t token_scores_workspace_bytes(int64_t rows, int64_t cols, int64_t num_segments) {
  return split_count(rows, num_segments) * 3 * num_segments * cols * static_cast<int64_t>(sizeof(float));
}

void token_scores(const TokenScoresParams& p, void* workspace, Stream stream) {
  const int64_t splits = split_count(p.rows, p.num_segments);
  auto* partials = static_cast<float*>(workspace);  // [splits, 3, B, D]
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    const bool packed = p.cols % kVec == 0 && aligned(p.z, p.z_stride, sizeof(T), 16) &&
                        aligned(p.grad_z, p.grad_z_stride, sizeof(T), 16);
    const int64_t stripes = ceil_div(p.cols, kWarp * (packed ? kVec : 1));
    launch(packed ? token_scores_kernel<T, kVec> : token_scores_kernel<T, 1>, stripes * p.num_segments * splits,
           dim3(kWarp, kRowLanes), stream, p, splits, partials);
  });
  launch_finish_scores(p.segments, p.num_segments, partials, splits, p.cols, p.scores, stream);
}

}  // namespace ssiuu::cuda
