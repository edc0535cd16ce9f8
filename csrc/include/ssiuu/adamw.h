// AdamW with decoupled weight decay, as torch.optim.AdamW computes it, for one scalar.
#pragma once

#include <cmath>

#include "ssiuu/types.h"

namespace ssiuu {

// The scalars of one step, worked out once in double on the host.
struct AdamWStep {
  float decay;                   // 1 - lr * weight_decay
  float one_minus_beta1;         //
  float beta2;                   //
  float one_minus_beta2;         //
  float step_size;               // lr / (1 - beta1^step)
  float inv_sqrt_bias_correct2;  // 1 / sqrt(1 - beta2^step)
  float eps;                     //

  AdamWStep() = default;
  AdamWStep(int64_t step, double lr, double beta1, double beta2_, double eps_, double weight_decay)
      : decay(static_cast<float>(1.0 - lr * weight_decay)),
        one_minus_beta1(static_cast<float>(1.0 - beta1)),
        beta2(static_cast<float>(beta2_)),
        one_minus_beta2(static_cast<float>(1.0 - beta2_)),
        step_size(static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))))),
        inv_sqrt_bias_correct2(static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2_, static_cast<double>(step))))),
        eps(static_cast<float>(eps_)) {}
};

SSIUU_HOST_DEVICE void adamw_update(float& param, float& exp_avg, float& exp_avg_sq, float grad, const AdamWStep& s) {
  exp_avg += s.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad;
  const float denominator = sqrtf(exp_avg_sq) * s.inv_sqrt_bias_correct2 + s.eps;
  param = param * s.decay - s.step_size * (exp_avg / denominator);
}

}  // namespace ssiuu
