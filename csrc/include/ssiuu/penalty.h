// The parameter-level penalty (paper, Algorithm 1) for one scalar, and the statistics of a step.
#pragma once

#include "ssiuu/types.h"

namespace ssiuu {

struct PenaltyTerm {
  float attribution;  // A = param * target_grad
  float growth;       // A - A_prev where A < 0, else 0
  float grad;         // 2 * weight * growth * target_grad
  bool negative;      // A < 0
};

// `twice_weight` is 2 * lambda, and 0 at the first step, where there is no A_prev to compare with.
SSIUU_HOST_DEVICE PenaltyTerm penalty_term(float param, float target_grad, float prev_attribution, float twice_weight,
                                           bool first_step) {
  PenaltyTerm term;
  term.attribution = param * target_grad;
  term.negative = term.attribution < 0.0f;
  term.growth = term.negative & !first_step ? term.attribution - prev_attribution : 0.0f;
  term.grad = term.negative & !first_step ? twice_weight * term.growth * target_grad : 0.0f;
  return term;
}

// In this order in memory: it is the double[5] that callers receive.
struct PenaltyStats {
  double value = 0.0;                // R = sum of growth^2
  double penalty_grad_square = 0.0;  // sum of squared penalty gradients
  double loss_grad_square = 0.0;     // sum of squared loss gradients, all scalars
  double outweighed = 0.0;           // number of scalars with A < 0 and |penalty gradient| > |loss gradient|
  double negative = 0.0;             // number of scalars with A < 0

  SSIUU_HOST_DEVICE void add(const PenaltyStats& other) {
    value += other.value;
    penalty_grad_square += other.penalty_grad_square;
    loss_grad_square += other.loss_grad_square;
    outweighed += other.outweighed;
    negative += other.negative;
  }
};

}  // namespace ssiuu
