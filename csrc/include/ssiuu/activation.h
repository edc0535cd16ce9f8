// Activations and their derivatives. Each has forward(x) and backward(x, grad), where grad is the gradient of the
// activation's output. At 0 the derivative of relu and relu squared is 0, as in PyTorch.
#pragma once

#include "ssiuu/math.h"
#include "ssiuu/types.h"

namespace ssiuu {

struct ActivationGrad {
  float value;   // act(x)
  float grad_x;  // grad * act'(x)
};

struct Silu {
  static SSIUU_HOST_DEVICE float forward(float x) { return x * sigmoid(x).value; }

  static SSIUU_HOST_DEVICE ActivationGrad backward(float x, float grad) {
    const Sigmoid s = sigmoid(x);
    return {x * s.value, grad * (s.value + x * s.slope)};
  }
};

struct Gelu {
  static SSIUU_HOST_DEVICE float forward(float x) { return x * standard_normal(x).cdf; }

  static SSIUU_HOST_DEVICE ActivationGrad backward(float x, float grad) {
    const Normal normal = standard_normal(x);
    return {x * normal.cdf, grad * (normal.cdf + x * normal.pdf)};
  }
};

// 0.5 x (1 + tanh(y)) = x sigmoid(2 y) with y = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float kTwoSqrt2OverPi = 1.59576912f;
  static constexpr float kCubic = 0.044715f;

  static SSIUU_HOST_DEVICE float twice_y(float x) { return kTwoSqrt2OverPi * (x + kCubic * x * x * x); }

  static SSIUU_HOST_DEVICE float forward(float x) { return x * sigmoid(twice_y(x)).value; }

  static SSIUU_HOST_DEVICE ActivationGrad backward(float x, float grad) {
    const Sigmoid s = sigmoid(twice_y(x));
    const float inner_slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    return {x * s.value, grad * (s.value + x * s.slope * inner_slope)};
  }
};

struct Relu {
  static SSIUU_HOST_DEVICE float forward(float x) { return x < 0.0f ? 0.0f : x; }

  static SSIUU_HOST_DEVICE ActivationGrad backward(float x, float grad) {
    return {forward(x), x <= 0.0f ? 0.0f : grad};
  }
};

struct ReluSquared {
  static SSIUU_HOST_DEVICE float forward(float x) { return x < 0.0f ? 0.0f : x * x; }

  static SSIUU_HOST_DEVICE ActivationGrad backward(float x, float grad) {
    return {forward(x), x <= 0.0f ? 0.0f : 2.0f * x * grad};
  }
};

}  // namespace ssiuu
