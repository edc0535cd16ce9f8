// AdamW with decoupled weight decay, as torch.optim.AdamW computes it, for one scalar.
#pragma once

#include <cmath>

#include "ssiuu/rounding.h"
#include "ssiuu/step.h"

namespace ssiuu {

struct AdamWStep {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correct2, eps;

  explicit SSIUU_HOST_DEVICE AdamWStep(const StepScalars& s)
      : decay(static_cast<float>(s.decay)),
        one_minus_beta1(static_cast<float>(s.one_minus_beta1)),
        beta2(static_cast<float>(s.beta2)),
        one_minus_beta2(static_cast<float>(s.one_minus_beta2)),
        step_size(static_cast<float>(s.step_size)),
        inv_sqrt_bias_correct2(static_cast<float>(s.inv_sqrt_bias_correct2)),
        eps(static_cast<float>(s.eps)) {}
};

SSIUU_HOST_DEVICE void adamw_update(float& param, float& exp_avg, float& exp_avg_sq, float grad, const AdamWStep& s) {
  exp_avg += s.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
  const float denominator = sqrtf(exp_avg_sq) * s.inv_sqrt_bias_correct2 + s.eps;
  param = param * s.decay - s.step_size * (exp_avg / denominator);
}

// Rounds the results of one scalar's update to the types in which they are stored.
template <bool kStochastic, class Param, class State>
SSIUU_HOST_DEVICE void store_update(Param& param, State& prev_attribution, State& exp_avg, State& exp_avg_sq, float w,
                                    float a, float m, float v, uint32_t key, int64_t index) {
  if constexpr (kStochastic) {
    const uint32_t first = random_bits(key, index, 0);
    const uint32_t second = random_bits(key, index, 1);
    param = round_at_random<Param>(w, first);
    prev_attribution = round_at_random<State>(a, first >> 16);
    exp_avg = round_at_random<State>(m, second);
    exp_avg_sq = round_at_random<State>(v, second >> 16);
  } else {
    param = from_float<Param>(w);
    prev_attribution = from_float<State>(a);
    exp_avg = from_float<State>(m);
    exp_avg_sq = from_float<State>(v);
  }
}

}  // namespace ssiuu
