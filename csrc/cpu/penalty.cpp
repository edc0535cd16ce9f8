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

// Runs chunk(begin, end) -> PenaltyStats over [0, n) and writes the statistics' sum to stats.
template <class Chunk>
void for_each_chunk(int64_t n, double* stats, Chunk&& chunk) {
  const int64_t count = ceil_div(n, kChunk);
  std::vector<PenaltyStats> partials(count);
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) partials[i] = chunk(i * kChunk, std::min((i + 1) * kChunk, n));
  PenaltyStats total{};
  for (const PenaltyStats& partial : partials) total.add(partial);
  stats[0] = total.value;
  stats[1] = total.penalty_grad_square;
  stats[2] = total.loss_grad_square;
  stats[3] = total.outweighed;
  stats[4] = total.negative;
}

// Applies the penalty to scalars [begin, end); write(i, sum of loss and penalty gradient) does the rest.
template <class Param, class Grad, class State, class Write>
PenaltyStats penalty_chunk(int64_t begin, int64_t end, const Param* param, const Grad* grad, const Grad* target_grad,
                           State* prev_attribution, PenaltyStep step, Write write) {
  double value = 0.0, penalty_grad_square = 0.0, loss_grad_square = 0.0;
  float outweighed = 0.0f, negative = 0.0f;  // exact: a chunk has fewer than 2^24 scalars
#pragma omp simd reduction(+ : value, penalty_grad_square, loss_grad_square, outweighed, negative)
  for (int64_t i = begin; i < end; ++i) {
    const float loss_grad = to_float(grad[i]);
    const PenaltyTerm term =
        penalty_term(to_float(param[i]), loss_grad, to_float(target_grad[i]), to_float(prev_attribution[i]), step);
    prev_attribution[i] = from_float<State>(term.attribution);
    write(i, loss_grad + term.grad);
    value += square(term.growth);
    penalty_grad_square += square(term.grad);
    loss_grad_square += square(loss_grad);
    outweighed += term.outweighs;
    negative += term.negative;
  }
  return {value, penalty_grad_square, loss_grad_square, outweighed, negative};
}

}  // namespace

void penalty(const PenaltyParams& p) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    const auto* param = static_cast<const Param*>(p.param);
    auto* grad = static_cast<Grad*>(p.grad);
    const auto* target_grad = static_cast<const Grad*>(p.target_grad);
    auto* prev_attribution = static_cast<State*>(p.prev_attribution);
    const PenaltyStep step(p.weight, p.step);
    for_each_chunk(p.n, p.stats, [&](int64_t begin, int64_t end) {
      return penalty_chunk(begin, end, param, grad, target_grad, prev_attribution, step,
                           [=](int64_t i, float sum) { grad[i] = from_float<Grad>(sum); });
    });
  });
}

void penalty_adamw(const PenaltyAdamWParams& p) {
  dispatch_dtypes(p.param_dtype, p.grad_dtype, p.state_dtype, [&](auto param_t, auto grad_t, auto state_t) {
    using Param = decltype(param_t);
    using Grad = decltype(grad_t);
    using State = decltype(state_t);
    auto* param = static_cast<Param*>(p.param);
    const auto* grad = static_cast<const Grad*>(p.grad);
    const auto* target_grad = static_cast<const Grad*>(p.target_grad);
    auto* prev_attribution = static_cast<State*>(p.prev_attribution);
    auto* exp_avg = static_cast<State*>(p.exp_avg);
    auto* exp_avg_sq = static_cast<State*>(p.exp_avg_sq);
    const PenaltyStep step(p.weight, p.step);
    const AdamWStep adamw(p.step, p.lr, p.beta1, p.beta2, p.eps, p.weight_decay);
    for_each_chunk(p.n, p.stats, [&](int64_t begin, int64_t end) {
      return penalty_chunk(begin, end, param, grad, target_grad, prev_attribution, step, [=](int64_t i, float sum) {
        float w = to_float(param[i]);
        float m = to_float(exp_avg[i]);
        float v = to_float(exp_avg_sq[i]);
        adamw_update(w, m, v, sum, adamw);
        param[i] = from_float<Param>(w);
        exp_avg[i] = from_float<State>(m);
        exp_avg_sq[i] = from_float<State>(v);
      });
    });
  });
}

}  // namespace ssiuu::cpu
