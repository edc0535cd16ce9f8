// One element of an MLP's hidden activation, h = act(x) * up where gated and h = act(x) where not, and its gradients.
// x is the gate of a gated MLP.
#pragma once

#include "ssiuu/activation.h"

namespace ssiuu {

template <class Act, bool kGated>
SSIUU_HOST_DEVICE float hidden_value(float x, float up) {
  return kGated ? Act::forward(x) * up : Act::forward(x);
}

struct HiddenGrad {
  float h;
  float grad_x;
  float grad_up;  // without meaning unless gated
};

template <class Act, bool kGated>
SSIUU_HOST_DEVICE HiddenGrad hidden_grad(float x, float up, float grad_h) {
  const ActivationGrad act = Act::backward(x, kGated ? grad_h * up : grad_h);
  return HiddenGrad{kGated ? act.value * up : act.value, act.grad_x, act.value * grad_h};
}

}  // namespace ssiuu
