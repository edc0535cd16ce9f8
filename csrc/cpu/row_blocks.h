// How the rows of [T, D] are divided into tasks: pieces of segments, whose rows are scored, and the rows between
// segments. The division depends on the shapes alone, so that results do not depend on the number of threads.
#pragma once

#include <vector>

#include "ssiuu/types.h"

namespace ssiuu::cpu {

// Long enough that combining the pieces' partial scores costs little beside reading the rows.
constexpr int64_t kMaxBlockRows = 256;

// Columns of one task: its running scores stay in the L1 cache, and a row's part is at least one memory page's worth
// of consecutive reads.
constexpr int64_t kStripeCols = 512;

struct RowBlock {
  int64_t start, end;  // rows
  int64_t segment;     // index into segments, or -1: rows that are not scored
  int64_t slot;        // where partial scores go, or -1: the segment is one block and its scores are final
};

struct RowBlocks {
  std::vector<RowBlock> blocks;
  int64_t num_slots = 0;
};

// With between = false the rows outside the segments are left out.
RowBlocks make_row_blocks(const Segment* segments, int64_t num_segments, int64_t rows, bool between);

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
