// One element of a gated MLP: h = act(gate) * up, and its gradients.
#pragma once

#include "ssiuu/activation.h"

namespace ssiuu {

template <class Act>
SSIUU_HOST_DEVICE float glu_value(float gate, float up) {
  return Act::forward(gate) * up;
}

struct GluGrad {
  float h;
  float grad_gate;
  float grad_up;
};

template <class Act>
SSIUU_HOST_DEVICE GluGrad glu_grad(float gate, float up, float grad_h) {
  const ActivationGrad act = Act::backward(gate, grad_h * up);
  return GluGrad{act.value * up, act.grad_x, act.value * grad_h};
}

}  // namespace ssiuu
