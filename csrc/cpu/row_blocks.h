// How the rows of [T, D] are divided into tasks: pieces of segments, whose rows are scored, and the rows between
// segments. The division depends on the shapes alone, so that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "ssiuu/types.h"

namespace ssiuu::cpu {

// Long enough that combining the pieces' partial scores costs little beside reading the rows.
constexpr int64_t kMaxBlockRows = 256;

// Columns of one task with scores, at most. A row's part has to span several memory pages: 512 columns of float32 are
// half a page, which is slower. With many more than 2048 the running scores would leave the L2 cache.
constexpr int64_t kStripeCols = 2048;
constexpr int64_t kMinStripeCols = 512;
constexpr int64_t kEnoughTasks = 32;  // stripes are as wide as they may be if there are so many tasks all the same

// Elements of one task without scores, which takes whole rows: memory's own order is the fastest.
constexpr int64_t kSlabSize = 1 << 15;
constexpr int64_t kWholeRows = int64_t{1} << 40;  // columns of its stripe: more than there are

inline int64_t slab_rows(int64_t cols) { return std::max<int64_t>(1, kSlabSize / std::max<int64_t>(1, cols)); }

struct RowBlock {
  int64_t start, end;  // rows
  int64_t segment;     // index into segments, or -1: rows that are not scored
  int64_t slot;        // where partial scores go, or -1: the segment is one block and its scores are final
};

struct RowBlocks {
  std::vector<RowBlock> blocks;
  int64_t num_slots = 0;
};

inline int64_t stripe_cols(const RowBlocks& plan, int64_t cols) {
  const auto blocks = static_cast<int64_t>(plan.blocks.size());
  int64_t stripe = kStripeCols;
  while (stripe > kMinStripeCols && blocks * ceil_div(cols, stripe) < kEnoughTasks) stripe /= 2;
  return stripe;
}

// Blocks have at most max_rows rows. With between = false the rows outside the segments are left out.
RowBlocks make_row_blocks(const Segment* segments, int64_t num_segments, int64_t rows, bool between, int64_t max_rows);

// Where the maximum, minimum and sum of one block start: base, base + stride, base + 2 * stride.
struct ScoreRows {
  float* base;
  int64_t stride;
};

inline ScoreRows score_rows(const RowBlock& block, float* scores, int64_t num_segments, float* partials, int64_t cols) {
  if (block.slot < 0) return {scores + block.segment * cols, num_segments * cols};
  return {partials + block.slot * 3 * cols, cols};
}

// Combines the partial scores [num_slots, 3, D] of segments made of several blocks, in row order, and writes zeros for
// empty segments. scores is [3, B, D].
void finish_scores(const RowBlocks& plan, const Segment* segments, int64_t num_segments, const float* partials,
                   int64_t cols, float* scores);

}  // namespace ssiuu::cpu
