// Attribution A = z * dP/dz of one scalar, and its running maximum, minimum and sum over tokens (paper, equation 1).
#pragma once

#include "ssiuu/types.h"

namespace ssiuu {

SSIUU_HOST_DEVICE float attribution(float z, float grad_z) { return z * grad_z; }

// NaN propagates, as in torch.amax and torch.amin: once the running value is NaN no comparison replaces it.
SSIUU_HOST_DEVICE float running_max(float running, float value) {
  return (value > running) | (value != value) ? value : running;
}

SSIUU_HOST_DEVICE float running_min(float running, float value) {
  return (value < running) | (value != value) ? value : running;
}

}  // namespace ssiuu
