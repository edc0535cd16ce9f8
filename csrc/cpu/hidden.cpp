#include "ssiuu/hidden.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "huge_pages.h"
#include "row_blocks.h"
#include "running_scores.h"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"
#include "ssiuu/neuron_penalty.h"

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

// Columns [col, col + count) of one row.
struct RowPart {
  int64_t row, col, count;
};

// The loops along a row, each compiled once for all who call it.

template <class T, class Act, bool kGated>
[[gnu::noinline]] void forward_row(const HiddenForwardParams& p, const RowPart& part) {
  const T* x = row_of<T>(p.x, part.row, p.x_stride, part.col);
  const T* up = kGated ? row_of<T>(p.up, part.row, p.up_stride, part.col) : x;
  T* h = row_of<T>(p.h, part.row, p.h_stride, part.col);
#pragma omp simd
  for (int64_t j = 0; j < part.count; ++j) {
    h[j] = from_float<T>(hidden_value<Act, kGated>(to_float(x[j]), to_float(up[j])));
  }
}

// The scores of a row, of grad_h as it arrived; nothing is written.
template <class T, class Act, bool kGated>
[[gnu::noinline]] void score_row(const HiddenBackwardParams& p, const RowPart& part, RunningScores& h_scores,
                                 RunningScores& x_scores) {
  const T* x = row_of<T>(p.x, part.row, p.x_stride, part.col);
  const T* up = kGated ? row_of<T>(p.up, part.row, p.up_stride, part.col) : x;
  const T* grad_h = row_of<T>(p.grad_h, part.row, p.grad_h_stride, part.col);
#pragma omp simd
  for (int64_t j = 0; j < part.count; ++j) {
    const float z = to_float(x[j]);
    const float dh = to_float(grad_h[j]);
    const HiddenGrad out = hidden_grad<Act, kGated>(z, to_float(up[j]), dh);
    h_scores.update(j, attribution(out.h, dh));
    x_scores.update(j, attribution(z, out.grad_x));
  }
}

enum class Row { kPlain, kScored, kPenalised };

// The gradients of a row: with its scores, or of grad_h times each column's factor.
template <class T, class Act, bool kGated, bool kWriteH, Row kRow>
[[gnu::noinline]] void backward_row(const HiddenBackwardParams& p, const RowPart& part, const float* factor = nullptr,
                                    RunningScores* h_scores = nullptr, RunningScores* x_scores = nullptr) {
  const T* x = row_of<T>(p.x, part.row, p.x_stride, part.col);
  const T* up = kGated ? row_of<T>(p.up, part.row, p.up_stride, part.col) : x;
  const T* grad_h = row_of<T>(p.grad_h, part.row, p.grad_h_stride, part.col);
  T* grad_x = row_of<T>(p.grad_x, part.row, p.grad_x_stride, part.col);
  T* grad_up = kGated ? row_of<T>(p.grad_up, part.row, p.grad_up_stride, part.col) : nullptr;
  T* h = kWriteH ? row_of<T>(p.h, part.row, p.h_stride, part.col) : nullptr;
#pragma omp simd
  for (int64_t j = 0; j < part.count; ++j) {
    const float z = to_float(x[j]);
    const float dh = kRow == Row::kPenalised ? to_float(grad_h[j]) * factor[j] : to_float(grad_h[j]);
    const HiddenGrad out = hidden_grad<Act, kGated>(z, to_float(up[j]), dh);
    grad_x[j] = from_float<T>(out.grad_x);
    if constexpr (kGated) grad_up[j] = from_float<T>(out.grad_up);
    if constexpr (kWriteH) h[j] = from_float<T>(out.h);
    if constexpr (kRow == Row::kScored) {
      h_scores->update(j, attribution(out.h, dh));
      x_scores->update(j, attribution(z, out.grad_x));
    }
  }
}

// Runs function(block, tile) over all blocks of rows and stripes of `width` columns.
template <class Function>
void for_each_tile(const RowBlocks& plan, int64_t cols, int64_t width, Function&& function) {
  const int64_t stripes = ceil_div(cols, width);
  const int64_t num_blocks = static_cast<int64_t>(plan.blocks.size());
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      const int64_t col = stripe * width;
      function(plan.blocks[b], Tile{plan.blocks[b].start, plan.blocks[b].end, col, std::min(width, cols - col)});
    }
  }
}

// Runs function(part) down the rows of a tile.
template <class Function>
void for_each_row(const Tile& tile, Function&& function) {
  for (int64_t row = tile.start; row < tile.end; ++row) function(RowPart{row, tile.col, tile.count});
}

// Where the scores of h and x go: a block's own partial ones, combined at the end.
class Scores {
 public:
  Scores(const HiddenBackwardParams& p, const RowBlocks& plan, float* h_scores, float* x_scores)
      : p_(p),
        plan_(plan),
        partial_size_(plan.num_slots * 3 * p.cols),
        partials_(new float[2 * partial_size_]),
        h_scores_(h_scores),
        x_scores_(x_scores) {}

  void store(const RowBlock& block, const Tile& tile, RunningScores& h, RunningScores& x) {
    h.store(score_rows(block, h_scores_, p_.num_segments, partials_.get(), p_.cols), tile.col);
    x.store(score_rows(block, x_scores_, p_.num_segments, partials_.get() + partial_size_, p_.cols), tile.col);
  }

  void finish() const {
    finish_scores(plan_, p_.segments, p_.num_segments, partials_.get(), p_.cols, h_scores_);
    finish_scores(plan_, p_.segments, p_.num_segments, partials_.get() + partial_size_, p_.cols, x_scores_);
  }

 private:
  const HiddenBackwardParams& p_;
  const RowBlocks& plan_;
  int64_t partial_size_;
  std::unique_ptr<float[]> partials_;  // [2, num_slots, 3, F]
  float* h_scores_;                    // [3, B, F]
  float* x_scores_;                    // [3, B, F]
};

// The factor of each sample's neurons, [B, F], from the sums of their scores; stores A in the bank.
std::vector<float> penalty_factors(const HiddenBackwardParams& p, const float* h_sum) {
  const NeuronPenaltyParams& penalty = p.penalty;
  std::vector<float> factors(p.num_segments * p.cols, 1.0f);
  for (int64_t b = 0; b < p.num_segments; ++b) {
    if (penalty.bank_rows[b] < 0) continue;
    float* bank = penalty.bank + penalty.bank_rows[b] * p.cols;
    for (int64_t j = 0; j < p.cols; ++j) {
      const NeuronTerm term = neuron_term(h_sum[b * p.cols + j], penalty.ratio[b], *penalty.weight, bank[j]);
      factors[b * p.cols + j] = term.factor;
      bank[j] = term.attribution;
    }
  }
  return factors;
}

// The gradients; grad_h of a sample's rows is multiplied by its factors, if there are any.
template <class T, class Act, bool kGated, bool kWriteH>
void write_grads(const HiddenBackwardParams& p, const float* factors) {
  const RowBlocks plan =
      make_row_blocks(p.segments, factors != nullptr ? p.num_segments : 0, p.rows, true, slab_rows(p.cols));
  for_each_tile(plan, p.cols, kWholeRows, [&](const RowBlock& block, const Tile& tile) {
    const bool penalised = factors != nullptr && block.segment >= 0;
    for_each_row(tile, [&](const RowPart& part) {
      penalised ? backward_row<T, Act, kGated, kWriteH, Row::kPenalised>(p, part, factors + block.segment * p.cols)
                : backward_row<T, Act, kGated, kWriteH, Row::kPlain>(p, part);
    });
  });
}

// The scores; and in the same pass the gradients, if kWrite.
template <class T, class Act, bool kGated, bool kWriteH, bool kWrite>
void write_scores(const HiddenBackwardParams& p, float* h_scores, float* x_scores) {
  const RowBlocks plan = make_row_blocks(p.segments, p.num_segments, p.rows, kWrite, kMaxBlockRows);
  Scores scores(p, plan, h_scores, x_scores);
  for_each_tile(plan, p.cols, stripe_cols(plan, p.cols), [&](const RowBlock& block, const Tile& tile) {
    if (block.segment < 0) {
      for_each_row(tile, [&](const RowPart& part) { backward_row<T, Act, kGated, kWriteH, Row::kPlain>(p, part); });
      return;
    }
    RunningScores h(tile.count), x(tile.count);
    for_each_row(tile, [&](const RowPart& part) {
      if constexpr (kWrite) {
        backward_row<T, Act, kGated, kWriteH, Row::kScored>(p, part, nullptr, &h, &x);
      } else {
        score_row<T, Act, kGated>(p, part, h, x);
      }
      h.end_row(part.row - tile.start + 1);
      x.end_row(part.row - tile.start + 1);
    });
    scores.store(block, tile, h, x);
  });
  scores.finish();
}

template <class T, class Act, bool kGated, bool kWriteH>
void backward(const HiddenBackwardParams& p) {
  const bool scored = p.h_scores != nullptr, penalised = p.penalty.bank != nullptr;
  if (!penalised) {
    scored ? write_scores<T, Act, kGated, kWriteH, true>(p, p.h_scores, p.x_scores)
           : write_grads<T, Act, kGated, kWriteH>(p, nullptr);
    return;
  }
  // The factors need a sample's whole sum, so a pass that only reads comes first.
  const int64_t size = 3 * p.num_segments * p.cols;
  const std::unique_ptr<float[]> own(scored ? nullptr : new float[2 * size]);
  float* h_scores = scored ? p.h_scores : own.get();
  write_scores<T, Act, kGated, false, false>(p, h_scores, scored ? p.x_scores : own.get() + size);
  const std::vector<float> factors = penalty_factors(p, h_scores + 2 * p.num_segments * p.cols);
  write_grads<T, Act, kGated, kWriteH>(p, factors.data());
}

// The rows of an output, which may be a fresh allocation.
void advise_rows(DType dtype, void* base, int64_t rows, int64_t cols, int64_t stride) {
  const int64_t size = dtype == DType::kFloat32 ? sizeof(float) : sizeof(BFloat16);
  if (base != nullptr) advise_huge_pages(base, ((rows - 1) * stride + cols) * size);
}

}  // namespace

void hidden_forward(const HiddenForwardParams& p) {
  advise_rows(p.dtype, p.h, p.rows, p.cols, p.h_stride);
  const RowBlocks plan = make_row_blocks(nullptr, 0, p.rows, true, slab_rows(p.cols));
  dispatch_mlp(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    for_each_tile(plan, p.cols, kWholeRows, [&](const RowBlock&, const Tile& tile) {
      for_each_row(tile, [&](const RowPart& part) {
        forward_row<decltype(element), decltype(act), decltype(gated)::value>(p, part);
      });
    });
  });
}

void hidden_backward(const HiddenBackwardParams& p) {
  advise_rows(p.dtype, p.grad_x, p.rows, p.cols, p.grad_x_stride);
  advise_rows(p.dtype, p.grad_up, p.rows, p.cols, p.grad_up_stride);
  advise_rows(p.dtype, p.h, p.rows, p.cols, p.h_stride);
  dispatch_mlp(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    using T = decltype(element);
    using Act = decltype(act);
    constexpr bool kGated = decltype(gated)::value;
    p.h != nullptr ? backward<T, Act, kGated, true>(p) : backward<T, Act, kGated, false>(p);
  });
}

}  // namespace ssiuu::cpu
