// The penalty on neurons (paper, equation 3): what it multiplies a neuron's backward signal by.
#pragma once

#include "ssiuu/types.h"

namespace ssiuu {

// A_t = ratio * (sum over the sample's rows of h * grad_h). The penalty weight * (A_t - A_prev)^2, counted where A_t <
// 0, has the gradient 2 * weight * (A_t - A_prev) * dP/dh, with dP/dh = ratio * grad_h held constant. A_prev is NaN
// where the sample has not been seen. With a weight of 0 the factor is 1 whatever A_prev is.
struct NeuronTerm {
  float attribution;  // A_t
  float factor;       // of grad_h
};

SSIUU_HOST_DEVICE NeuronTerm neuron_term(float h_sum, float ratio, float weight, float prev_attribution) {
  const float a = ratio * h_sum;
  const bool penalised = (a < 0.0f) & (prev_attribution == prev_attribution) & (weight > 0.0f);
  return {a, penalised ? 1.0f + 2.0f * weight * ratio * (a - prev_attribution) : 1.0f};
}

}  // namespace ssiuu
