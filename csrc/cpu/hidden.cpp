#include "ssiuu/hidden.h"

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <vector>

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

template <class T, class Act, bool kGated>
void forward_tile(const HiddenForwardParams& p, const Tile& tile) {
  for (int64_t row = tile.start; row < tile.end; ++row) {
    const T* x = row_of<T>(p.x, row, p.x_stride, tile.col);
    const T* up = kGated ? row_of<T>(p.up, row, p.up_stride, tile.col) : x;
    T* h = row_of<T>(p.h, row, p.h_stride, tile.col);
#pragma omp simd
    for (int64_t j = 0; j < tile.count; ++j) {
      h[j] = from_float<T>(hidden_value<Act, kGated>(to_float(x[j]), to_float(up[j])));
    }
  }
}

// The scores of a tile, of grad_h as it arrived; nothing is written.
template <class T, class Act, bool kGated>
void score_tile(const HiddenBackwardParams& p, const Tile& tile, RunningScores& h_scores, RunningScores& x_scores) {
  for (int64_t row = tile.start; row < tile.end; ++row) {
    const T* x = row_of<T>(p.x, row, p.x_stride, tile.col);
    const T* up = kGated ? row_of<T>(p.up, row, p.up_stride, tile.col) : x;
    const T* grad_h = row_of<T>(p.grad_h, row, p.grad_h_stride, tile.col);
#pragma omp simd
    for (int64_t j = 0; j < tile.count; ++j) {
      const float z = to_float(x[j]);
      const float dh = to_float(grad_h[j]);
      const HiddenGrad out = hidden_grad<Act, kGated>(z, to_float(up[j]), dh);
      h_scores.update(j, attribution(out.h, dh));
      x_scores.update(j, attribution(z, out.grad_x));
    }
    h_scores.end_row(row - tile.start + 1);
    x_scores.end_row(row - tile.start + 1);
  }
}

// The gradients of a tile whose grad_h is multiplied by a factor for each column, and its scores where asked for.
template <class T, class Act, bool kGated, bool kWriteH, bool kScores>
void backward_tile(const HiddenBackwardParams& p, const Tile& tile, const float* factor, RunningScores* h_scores,
                   RunningScores* x_scores) {
  for (int64_t row = tile.start; row < tile.end; ++row) {
    const T* x = row_of<T>(p.x, row, p.x_stride, tile.col);
    const T* up = kGated ? row_of<T>(p.up, row, p.up_stride, tile.col) : x;
    const T* grad_h = row_of<T>(p.grad_h, row, p.grad_h_stride, tile.col);
    T* grad_x = row_of<T>(p.grad_x, row, p.grad_x_stride, tile.col);
    T* grad_up = kGated ? row_of<T>(p.grad_up, row, p.grad_up_stride, tile.col) : nullptr;
    T* h = kWriteH ? row_of<T>(p.h, row, p.h_stride, tile.col) : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < tile.count; ++j) {
      const float z = to_float(x[j]);
      const float dh = to_float(grad_h[j]) * factor[j];
      const HiddenGrad out = hidden_grad<Act, kGated>(z, to_float(up[j]), dh);
      grad_x[j] = from_float<T>(out.grad_x);
      if constexpr (kGated) grad_up[j] = from_float<T>(out.grad_up);
      if constexpr (kWriteH) h[j] = from_float<T>(out.h);
      if constexpr (kScores) {
        h_scores->update(j, attribution(out.h, dh));
        x_scores->update(j, attribution(z, out.grad_x));
      }
    }
    if constexpr (kScores) {
      h_scores->end_row(row - tile.start + 1);
      x_scores->end_row(row - tile.start + 1);
    }
  }
}

constexpr std::array<float, kStripeCols> make_ones() {
  std::array<float, kStripeCols> ones{};
  for (float& one : ones) one = 1.0f;
  return ones;
}

constexpr std::array<float, kStripeCols> kOnes = make_ones();

// Runs tile(block, tile) over all blocks of rows and stripes of columns.
template <class Function>
void for_each_tile(const RowBlocks& plan, int64_t cols, Function&& function) {
  const int64_t stripes = ceil_div(cols, kStripeCols);
  const int64_t num_blocks = static_cast<int64_t>(plan.blocks.size());
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t stripe = 0; stripe < stripes; ++stripe) {
      const int64_t col = stripe * kStripeCols;
      function(plan.blocks[b], Tile{plan.blocks[b].start, plan.blocks[b].end, col, std::min(kStripeCols, cols - col)});
    }
  }
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
    h.store(score_rows(block, h_scores_, p_.num_segments, partials_.get(), p_.cols), tile.col, tile.count);
    x.store(score_rows(block, x_scores_, p_.num_segments, partials_.get() + partial_size_, p_.cols), tile.col,
            tile.count);
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

// The gradients, and the scores where they are of the same pass.
template <class T, class Act, bool kGated, bool kWriteH>
void write_grads(const HiddenBackwardParams& p, const RowBlocks& plan, Scores* scores, const float* factors) {
  for_each_tile(plan, p.cols, [&](const RowBlock& block, const Tile& tile) {
    const bool penalised = factors != nullptr && block.segment >= 0;
    const float* factor = penalised ? factors + block.segment * p.cols + tile.col : kOnes.data();
    if (scores == nullptr || block.segment < 0) {
      backward_tile<T, Act, kGated, kWriteH, false>(p, tile, factor, nullptr, nullptr);
      return;
    }
    RunningScores h, x;
    h.reset();
    x.reset();
    backward_tile<T, Act, kGated, kWriteH, true>(p, tile, factor, &h, &x);
    scores->store(block, tile, h, x);
  });
}

template <class T, class Act, bool kGated, bool kWriteH>
void backward(const HiddenBackwardParams& p) {
  const bool scored = p.h_scores != nullptr, penalised = p.penalty.bank != nullptr;
  const RowBlocks plan = make_row_blocks(p.segments, scored || penalised ? p.num_segments : 0, p.rows, true);
  if (!penalised) {
    Scores scores(p, plan, p.h_scores, p.x_scores);
    write_grads<T, Act, kGated, kWriteH>(p, plan, scored ? &scores : nullptr, nullptr);
    if (scored) scores.finish();
    return;
  }
  // The factors need a sample's whole sum, so a pass that only reads comes first.
  const int64_t size = 3 * p.num_segments * p.cols;
  const std::unique_ptr<float[]> own(scored ? nullptr : new float[2 * size]);
  float* h_scores = scored ? p.h_scores : own.get();
  Scores scores(p, plan, h_scores, scored ? p.x_scores : own.get() + size);
  for_each_tile(plan, p.cols, [&](const RowBlock& block, const Tile& tile) {
    if (block.segment < 0) return;
    RunningScores h, x;
    h.reset();
    x.reset();
    score_tile<T, Act, kGated>(p, tile, h, x);
    scores.store(block, tile, h, x);
  });
  scores.finish();
  const std::vector<float> factors = penalty_factors(p, h_scores + 2 * p.num_segments * p.cols);
  write_grads<T, Act, kGated, kWriteH>(p, plan, nullptr, factors.data());
}

// Calls function(T{}, Act{}, gated) with gated a std::bool_constant.
template <class Function>
void dispatch(DType dtype, Activation activation, bool gated, Function&& function) {
  dispatch_dtype(dtype, [&](auto element) {
    dispatch_activation(activation, [&](auto act) {
      gated ? function(element, act, std::true_type{}) : function(element, act, std::false_type{});
    });
  });
}

}  // namespace

void hidden_forward(const HiddenForwardParams& p) {
  const RowBlocks plan = make_row_blocks(nullptr, 0, p.rows, true);
  dispatch(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    for_each_tile(plan, p.cols, [&](const RowBlock&, const Tile& tile) {
      forward_tile<decltype(element), decltype(act), decltype(gated)::value>(p, tile);
    });
  });
}

void hidden_backward(const HiddenBackwardParams& p) {
  dispatch(p.dtype, p.activation, p.up != nullptr, [&](auto element, auto act, auto gated) {
    using T = decltype(element);
    using Act = decltype(act);
    constexpr bool kGated = decltype(gated)::value;
    p.h != nullptr ? backward<T, Act, kGated, true>(p) : backward<T, Act, kGated, false>(p);
  });
}

}  // namespace ssiuu::cpu
