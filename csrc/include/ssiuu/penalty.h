// The parameter-level penalty (paper, Algorithm 1) for one scalar, and the statistics of a step.
#pragma once

#include <cmath>

#include "ssiuu/attribution.h"
#include "ssiuu/step.h"

namespace ssiuu {

struct PenaltyStep {
  float twice_weight, threshold;

  explicit SSIUU_HOST_DEVICE PenaltyStep(const StepScalars& s)
      : twice_weight(static_cast<float>(s.twice_weight)), threshold(static_cast<float>(s.threshold)) {}
};

struct PenaltyTerm {
  float attribution;  // A = param * target_grad
  float growth;       // A - A_prev where A is penalised, else 0
  float grad;         // 2 * weight * growth * target_grad there, else 0
  float outweighs;  // 1 where |grad| > |loss_grad|, else 0; a count in float does not keep loops from being vectorised
  float negative;   // 1 where A < 0, else 0
};

// A_prev is NaN where it was never measured, and A is not penalised there. The selects keep 0 times infinity out: with
// a weight of 0, and outside of what is penalised, the gradient is 0 whatever A, A_prev and target_grad are.
SSIUU_HOST_DEVICE PenaltyTerm penalty_term(float param, float loss_grad, float target_grad, float prev_attribution,
                                           PenaltyStep step) {
  const float a = attribution(param, target_grad);
  const bool penalised = (a < step.threshold) & (prev_attribution == prev_attribution);
  const float growth = penalised ? a - prev_attribution : 0.0f;
  const float grad = penalised & (step.twice_weight > 0.0f) ? step.twice_weight * growth * target_grad : 0.0f;
  return PenaltyTerm{a, growth, grad, fabsf(grad) > fabsf(loss_grad) ? 1.0f : 0.0f, a < 0.0f ? 1.0f : 0.0f};
}

// Whether a step keeps the A_prev that it finds. The first step finds none.
SSIUU_HOST_DEVICE bool keeps_anchor(bool keep_anchor, const StepScalars& s) {
  return keep_anchor && s.threshold == 0.0;
}

// What the next step finds as A_prev: A, or A_prev where that is kept and known.
SSIUU_HOST_DEVICE float next_anchor(float attribution, float prev_attribution, bool keep) {
  return keep & (prev_attribution == prev_attribution) ? prev_attribution : attribution;
}

// In double: attributions of 1e-20 and less are common, and their float squares would be 0.
SSIUU_HOST_DEVICE double square(float x) { return static_cast<double>(x) * static_cast<double>(x); }

// In this order in memory: it is the double[5] that callers receive.
struct PenaltyStats {
  double value;                // R = sum of growth^2
  double penalty_grad_square;  // sum of squared penalty gradients
  double loss_grad_square;     // sum of squared loss gradients, all scalars
  double outweighed;           // number of scalars with A < 0 and |penalty gradient| > |loss gradient|
  double negative;             // number of scalars with A < 0

  SSIUU_HOST_DEVICE void add(const PenaltyStats& other) {
    value += other.value;
    penalty_grad_square += other.penalty_grad_square;
    loss_grad_square += other.loss_grad_square;
    outweighed += other.outweighed;
    negative += other.negative;
  }
};

}  // namespace ssiuu
