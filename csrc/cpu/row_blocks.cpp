#include "row_blocks.h"

#include <algorithm>
#include <numeric>

#include "ssiuu/attribution.h"

namespace ssiuu::cpu {
namespace {

void append_blocks(RowBlocks& plan, int64_t start, int64_t end, int64_t segment, int64_t max_rows) {
  const int64_t count = ceil_div(end - start, max_rows);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = segment >= 0 && count > 1 ? plan.num_slots++ : -1;
    plan.blocks.push_back({start + (end - start) * i / count, start + (end - start) * (i + 1) / count, segment, slot});
  }
}

}  // namespace

RowBlocks make_row_blocks(const Segment* segments, int64_t num_segments, int64_t rows, bool between, int64_t max_rows) {
  std::vector<int64_t> order(num_segments);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return segments[a].start < segments[b].start; });

  RowBlocks plan;
  int64_t row = 0;
  for (const int64_t segment : order) {
    const auto [start, end] = segments[segment];
    if (start == end) continue;
    if (between) append_blocks(plan, row, start, -1, max_rows);
    append_blocks(plan, start, end, segment, max_rows);
    row = end;
  }
  if (between) append_blocks(plan, row, rows, -1, max_rows);
  return plan;
}

void finish_scores(const RowBlocks& plan, const Segment* segments, int64_t num_segments, const float* partials,
                   int64_t cols, float* scores) {
  const int64_t stat = num_segments * cols;
  for (int64_t b = 0; b < num_segments; ++b) {
    if (segments[b].start != segments[b].end) continue;
    for (int s = 0; s < 3; ++s) std::fill_n(scores + s * stat + b * cols, cols, 0.0f);
  }
  if (plan.num_slots == 0) return;
  const int64_t stripes = ceil_div(cols, kStripeCols);
#pragma omp parallel for schedule(static)
  for (int64_t stripe = 0; stripe < stripes; ++stripe) {
    const int64_t begin = stripe * kStripeCols;
    const int64_t end = std::min(begin + kStripeCols, cols);
    int64_t previous = -1;
    for (const RowBlock& block : plan.blocks) {
      if (block.slot < 0) continue;
      const float* partial = partials + block.slot * 3 * cols;
      float* score = scores + block.segment * cols;
      const bool first = block.segment != previous;
      previous = block.segment;
      if (first) {
        for (int s = 0; s < 3; ++s)
          std::copy(partial + s * cols + begin, partial + s * cols + end, score + s * stat + begin);
        continue;
      }
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        score[j] = running_max(score[j], partial[j]);
        score[stat + j] = running_min(score[stat + j], partial[cols + j]);
        score[2 * stat + j] += partial[2 * cols + j];
      }
    }
  }
}

}  // namespace ssiuu::cpu
