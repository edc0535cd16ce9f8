#include "ssiuu/penalty.h"

#include <algorithm>
#include <vector>

#include "ssiuu/adamw.h"
#include "ssiuu/dispatch.h"
#include "ssiuu/kernels.h"

namespace ssiuu::cpu {
namespace {

// Scalars of one task. Each task has partial statistics of its own, combined in order afterwards.
constexpr int64_t kChunk = 1 << 14;

struct Chunk {
  const PenaltyTensors* tensors;
  int64_t begin, end;
};

// Runs function(chunk) -> PenaltyStats over the chunks of all tensors, and writes the statistics' sum to stats.
template <class Function>
void for_each_chunk(const PenaltyParams& p, Function&& function) {
  std::vector<Chunk> chunks;
  for (const PenaltyTensors& t : p.tensors) {
    for (int64_t i = 0; i < t.n; i += kChunk) chunks.push_back({&t, i, std::min(i + kChunk, t.n)});
  }
  const auto count = static_cast<int64_t>(chunks.size());
  std::vector<PenaltyStats> partials(count);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) partials[i] = function(chunks[i]);
  PenaltyStats total{};
  for (const PenaltyStats& partial : partials) total.add(partial);
  p.stats[0] = total.value;
  p.stats[1] = total.penalty_grad_square;
  p.stats[2] = total.loss_grad_square;
  p.stats[3] = total.outweighed;
  p.stats[4] = total.negative;
}

// Applies the penalty to one chunk; write(i, attribution, sum of loss and penalty gradient) does the rest. The step's
// scalars come by value: read through a reference they keep clang from vectorising the loop.
template <class Param, class Grad, class State, class Write>
PenaltyStats penalty_chunk(const Chunk& chunk, PenaltyStep step, Write write) {
  const auto* param = static_cast<const Param*>(chunk.tensors->param);
  const auto* grad = static_cast<const Grad*>(chunk.tensors->grad);
  const auto* target_grad = static_cast<const Grad*>(chunk.tensors->target_grad);
  const auto* prev_attribution = static_cast<const State*>(chunk.tensors->prev_attribution);
  double value = 0.0, penalty_grad_square = 0.0, loss_grad_square = 0.0;
  float outweighed = 0.0f, negative = 0.0f;  // exact: a chunk has fewer than 2^24 scalars
#pragma omp simd reduction(+ : value, penalty_grad_square, loss_grad_square, outweighed, negative)
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const float loss_grad = to_float(grad[i]);
    const PenaltyTerm term =
        penalty_term(to_float(param[i]), loss_grad, to_float(target_grad[i]), to_float(prev_attribution[i]), step);
    write(i, term.attribution, loss_grad + term.grad);
    value += square(term.growth);
    penalty_grad_square += square(term.grad);
    loss_grad_square += square(loss_grad);
    outweighed += term.outweighs;
    negative += term.negative;
  }
  return {value, penalty_grad_square, loss_grad_square, outweighed, negative};
}

// Runs function() -> PenaltyStats, which stores A over one chunk, and puts back the A_prev that are kept. A pass of its
// own, in the cache: the same select inside of the loop above makes it half as slow again.
template <class State, class Function>
PenaltyStats with_kept_anchor(const Chunk& chunk, bool keep, Function&& function) {
  if (!keep) return function();
  auto* prev_attribution = static_cast<State*>(chunk.tensors->prev_attribution) + chunk.begin;
  const std::vector<State> before(prev_attribution, prev_attribution + (chunk.end - chunk.begin));
  const PenaltyStats stats = function();
  for (size_t i = 0; i < before.size(); ++i) {
    prev_attribution[i] = from_float<State>(next_anchor(to_float(prev_attribution[i]), to_float(before[i]), keep));
  }
  return stats;
}

template <class Param, class Grad, class State, bool kStochastic>
void run_adamw(const PenaltyParams& p, const StepScalars& scalars) {
  const PenaltyStep step(scalars);
  const AdamWStep adamw(scalars);
  const bool keep = keeps_anchor(p.keep_anchor, scalars);
  for_each_chunk(p, [&](const Chunk& chunk) {
    auto* param = static_cast<Param*>(chunk.tensors->param);
    auto* prev_attribution = static_cast<State*>(chunk.tensors->prev_attribution);
    auto* exp_avg = static_cast<State*>(chunk.tensors->exp_avg);
    auto* exp_avg_sq = static_cast<State*>(chunk.tensors->exp_avg_sq);
    const uint32_t key = rounding_key(chunk.tensors->seed, static_cast<uint32_t>(scalars.step));
    return with_kept_anchor<State>(chunk, keep, [&] {
      return penalty_chunk<Param, Grad, State>(chunk, step, [=](int64_t i, float attribution, float grad) {
        float w = to_float(param[i]);
        float m = to_float(exp_avg[i]);
        float v = to_float(exp_avg_sq[i]);
        adamw_update(w, m, v, grad, adamw);
        store_update<kStochastic>(param[i], prev_attribution[i], exp_avg[i], exp_avg_sq[i], w, attribution, m, v, key,
                                  i);
      });
    });
  });
}

const StepScalars& scalars_of(const PenaltyParams& p) {
  return p.device_scalars != nullptr ? *p.device_scalars : p.scalars;
}

}  // namespace

void penalty(const PenaltyParams& p) {
  const PenaltyStep step(scalars_of(p));
  const bool keep = keeps_anchor(p.keep_anchor, scalars_of(p));
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    for_each_chunk(p, [&](const Chunk& chunk) {
      auto* grad = static_cast<Grad*>(chunk.tensors->grad);
      auto* prev_attribution = static_cast<State*>(chunk.tensors->prev_attribution);
      return with_kept_anchor<State>(chunk, keep, [&] {
        return penalty_chunk<Param, Grad, State>(chunk, step, [=](int64_t i, float attribution, float sum) {
          prev_attribution[i] = from_float<State>(attribution);
          grad[i] = from_float<Grad>(sum);
        });
      });
    });
  });
}

void penalty_adamw(const PenaltyParams& p) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    p.stochastic ? run_adamw<Param, Grad, State, true>(p, scalars_of(p))
                 : run_adamw<Param, Grad, State, false>(p, scalars_of(p));
  });
}

}  // namespace ssiuu::cpu
