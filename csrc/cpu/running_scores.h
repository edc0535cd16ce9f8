// Running maximum, minimum and sum over the rows of one block, for one stripe of columns.
#pragma once

#include <algorithm>
#include <limits>

#include "row_blocks.h"
#include "ssiuu/attribution.h"

namespace ssiuu::cpu {

struct alignas(64) RunningScores {
  float max[kStripeCols];
  float min[kStripeCols];
  float sum[kStripeCols];

  void reset() {
    std::fill_n(max, kStripeCols, -std::numeric_limits<float>::infinity());
    std::fill_n(min, kStripeCols, std::numeric_limits<float>::infinity());
    std::fill_n(sum, kStripeCols, 0.0f);
  }

  void update(int64_t j, float value) {
    max[j] = running_max(max[j], value);
    min[j] = running_min(min[j], value);
    sum[j] += value;
  }

  void store(ScoreRows target, int64_t col, int64_t count) const {
    std::copy_n(max, count, target.base + col);
    std::copy_n(min, count, target.base + target.stride + col);
    std::copy_n(sum, count, target.base + 2 * target.stride + col);
  }
};

}  // namespace ssiuu::cpu
