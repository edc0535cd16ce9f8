#include <algorithm>
#include <memory>

#include "row_blocks.h"
#include "running_scores.h"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cpu {
namespace {

template <class T>
void scores_of_segments(const TokenScoresParams& p) {
  const RowBlocks plan = make_row_blocks(p.segments, p.num_segments, p.rows, false, kMaxBlockRows);
  const int64_t width = stripe_cols(plan, p.cols), stripes = ceil_div(p.cols, width);
  const int64_t num_blocks = static_cast<int64_t>(plan.blocks.size());
  const std::unique_ptr<float[]> partials(new float[plan.num_slots * 3 * p.cols]);  // [num_slots, 3, D]
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      const RowBlock& block = plan.blocks[b];
      const int64_t col = stripe * width;
      const int64_t count = std::min(width, p.cols - col);
      RunningScores scores(count);
      for (int64_t row = block.start; row < block.end; ++row) {
        const T* z = static_cast<const T*>(p.z) + row * p.z_stride + col;
        const T* grad_z = static_cast<const T*>(p.grad_z) + row * p.grad_z_stride + col;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) scores.update(j, attribution(to_float(z[j]), to_float(grad_z[j])));
        scores.end_row(row - block.start + 1);
      }
      scores.store(score_rows(block, p.scores, p.num_segments, partials.get(), p.cols), col);
    }
  }
  finish_scores(plan, p.segments, p.num_segments, partials.get(), p.cols, p.scores);
}

}  // namespace

void token_scores(const TokenScoresParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { scores_of_segments<decltype(element)>(p); });
}

}  // namespace ssiuu::cpu
