// Running maximum, minimum and sum over the rows of one block, for one stripe of columns.
#pragma once

#include <algorithm>
#include <limits>

#include "row_blocks.h"
#include "ssiuu/attribution.h"

namespace ssiuu::cpu {

// Sums are kept in two levels, a few rows and the block, so that the rounding error of a long block stays near that of
// PyTorch's cascade summation.
constexpr int64_t kSumRows = 16;

struct alignas(64) RunningScores {
  float max[kStripeCols];
  float min[kStripeCols];
  float sum[kStripeCols];         // of the block's rows up to the last flush
  float recent_sum[kStripeCols];  // of the rows since

  explicit RunningScores(int64_t count) : count_(count) {
    std::fill_n(max, count, -std::numeric_limits<float>::infinity());
    std::fill_n(min, count, std::numeric_limits<float>::infinity());
    std::fill_n(sum, count, 0.0f);
    std::fill_n(recent_sum, count, 0.0f);
  }

  void update(int64_t j, float value) {
    max[j] = running_max(max[j], value);
    min[j] = running_min(min[j], value);
    recent_sum[j] += value;
  }

  // To be called after every row, counted from 1 within the block.
  void end_row(int64_t row) {
    if (row % kSumRows == 0) flush();
  }

  void store(ScoreRows target, int64_t col) {
    flush();
    std::copy_n(max, count_, target.base + col);
    std::copy_n(min, count_, target.base + target.stride + col);
    std::copy_n(sum, count_, target.base + 2 * target.stride + col);
  }

 private:
  void flush() {
    for (int64_t j = 0; j < count_; ++j) {
      sum[j] += recent_sum[j];
      recent_sum[j] = 0.0f;
    }
  }

  int64_t count_;  // columns in use
};

}  // namespace ssiuu::cpu
