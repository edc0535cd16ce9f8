// The scalars of one optimizer step.
#pragma once

#include "ssiuu/types.h"

namespace ssiuu {

// As ssiuu_kernels/ops/penalty/scalars.py derives them, in this order: on the host, or in device memory for a captured
// graph.
struct StepScalars {
  double decay;                   // 1 - lr * weight_decay
  double one_minus_beta1;         //
  double beta2;                   //
  double one_minus_beta2;         //
  double step_size;               // lr / (1 - beta1^step)
  double inv_sqrt_bias_correct2;  // 1 / sqrt(1 - beta2^step)
  double eps;                     //
  double twice_weight;            // 2 * lambda
  double threshold;               // A below it is penalised: 0, and -infinity at the first step, which has no A_prev
  double step;                    // from 1
};

constexpr int kStepScalars = sizeof(StepScalars) / sizeof(double);

}  // namespace ssiuu
