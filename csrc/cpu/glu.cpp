#include "ssiuu/glu.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "row_blocks.h"
#include "running_scores.h"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cpu {
namespace {

// Rows [start, end) and columns [col, col + count) of the op's tensors.
struct Tile {
  int64_t start, end, col, count;
};

template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride, int64_t col) {
  return static_cast<const T*>(base) + row * stride + col;
}

template <class T>
T* row_of(void* base, int64_t row, int64_t stride, int64_t col) {
  return static_cast<T*>(base) + row * stride + col;
}

template <class T, class Act>
void forward_tile(const GluForwardParams& p, const Tile& tile) {
  for (int64_t row = tile.start; row < tile.end; ++row) {
    const T* gate = row_of<T>(p.gate, row, p.gate_stride, tile.col);
    const T* up = row_of<T>(p.up, row, p.up_stride, tile.col);
    T* h = row_of<T>(p.h, row, p.h_stride, tile.col);
#pragma omp simd
    for (int64_t j = 0; j < tile.count; ++j) {
      h[j] = from_float<T>(glu_value<Act>(to_float(gate[j]), to_float(up[j])));
    }
  }
}

template <class T, class Act, bool kWriteH, bool kScores>
void backward_tile(const GluBackwardParams& p, const Tile& tile, RunningScores* h_scores, RunningScores* gate_scores) {
  for (int64_t row = tile.start; row < tile.end; ++row) {
    const T* gate = row_of<T>(p.gate, row, p.gate_stride, tile.col);
    const T* up = row_of<T>(p.up, row, p.up_stride, tile.col);
    const T* grad_h = row_of<T>(p.grad_h, row, p.grad_h_stride, tile.col);
    T* grad_gate = row_of<T>(p.grad_gate, row, p.grad_gate_stride, tile.col);
    T* grad_up = row_of<T>(p.grad_up, row, p.grad_up_stride, tile.col);
    T* h = kWriteH ? row_of<T>(p.h, row, p.h_stride, tile.col) : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < tile.count; ++j) {
      const float g = to_float(gate[j]);
      const float dh = to_float(grad_h[j]);
      const GluGrad out = glu_grad<Act>(g, to_float(up[j]), dh);
      grad_gate[j] = from_float<T>(out.grad_gate);
      grad_up[j] = from_float<T>(out.grad_up);
      if constexpr (kWriteH) h[j] = from_float<T>(out.h);
      if constexpr (kScores) {
        h_scores->update(j, attribution(out.h, dh));
        gate_scores->update(j, attribution(g, out.grad_gate));
      }
    }
    if constexpr (kScores) {
      h_scores->end_row(row - tile.start + 1);
      gate_scores->end_row(row - tile.start + 1);
    }
  }
}

template <class T, class Act, bool kWriteH>
void backward(const GluBackwardParams& p) {
  const bool scores = p.h_scores != nullptr;
  const RowBlocks plan = make_row_blocks(p.segments, scores ? p.num_segments : 0, p.rows, true);
  const int64_t stripes = ceil_div(p.cols, kStripeCols);
  const int64_t num_blocks = static_cast<int64_t>(plan.blocks.size());
  const int64_t partial_size = plan.num_slots * 3 * p.cols;
  const std::unique_ptr<float[]> partials(new float[2 * partial_size]);  // [2, num_slots, 3, F]
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      const RowBlock& block = plan.blocks[b];
      const int64_t col = stripe * kStripeCols;
      const Tile tile{block.start, block.end, col, std::min(kStripeCols, p.cols - col)};
      if (block.segment < 0) {
        backward_tile<T, Act, kWriteH, false>(p, tile, nullptr, nullptr);
        continue;
      }
      RunningScores h_scores, gate_scores;
      h_scores.reset();
      gate_scores.reset();
      backward_tile<T, Act, kWriteH, true>(p, tile, &h_scores, &gate_scores);
      h_scores.store(score_rows(block, p.h_scores, p.num_segments, partials.get(), p.cols), col, tile.count);
      gate_scores.store(score_rows(block, p.gate_scores, p.num_segments, partials.get() + partial_size, p.cols), col,
                        tile.count);
    }
  }
  if (scores) {
    finish_scores(plan, p.segments, p.num_segments, partials.get(), p.cols, p.h_scores);
    finish_scores(plan, p.segments, p.num_segments, partials.get() + partial_size, p.cols, p.gate_scores);
  }
}

}  // namespace

void glu_forward(const GluForwardParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_activation(p.activation, [&](auto act) {
      using Act = decltype(act);
      const int64_t stripes = ceil_div(p.cols, kStripeCols);
      const int64_t row_blocks = ceil_div(p.rows, kMaxBlockRows);
#pragma omp parallel for collapse(2) schedule(dynamic)
      for (int64_t b = 0; b < row_blocks; ++b) {
        for (int64_t stripe = 0; stripe < stripes; ++stripe) {
          const int64_t row = b * kMaxBlockRows;
          const int64_t col = stripe * kStripeCols;
          forward_tile<T, Act>(p,
                               {row, std::min(row + kMaxBlockRows, p.rows), col, std::min(kStripeCols, p.cols - col)});
        }
      }
    });
  });
}

void glu_backward(const GluBackwardParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_activation(p.activation, [&](auto act) {
      using Act = decltype(act);
      p.h != nullptr ? backward<T, Act, true>(p) : backward<T, Act, false>(p);
    });
  });
}

}  // namespace ssiuu::cpu
