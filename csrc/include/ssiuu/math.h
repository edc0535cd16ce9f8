// Elementary functions in float32, free of branches: a loop that calls libm is not vectorised. The device has its own
// exp. Accuracies are the worst found in a sweep over the whole float32 range.
#pragma once

#include <cmath>

#include "ssiuu/types.h"

namespace ssiuu {

// e^x for x <= 0, to 1.01 ulp; gradual underflow to 0, NaN kept.
SSIUU_HOST_DEVICE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // x = n log(2) + r with |r| <= log(2) / 2. Adding and subtracting 1.5 * 2^23 rounds to the nearest integer; 64 more
  // keeps 2^(n + 64) a normal number.
  constexpr float kRound = 12582912.0f + 64.0f;
  constexpr float kLog2Hi = 0x1.62e4p-1f;  // 15 bits: n * kLog2Hi is exact
  constexpr float kLog2Lo = 0x1.7f7d1cp-20f;
  const float clamped = -104.0f > x ? -104.0f : x;
  const float shifted = clamped * 0x1.715476p+0f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLog2Hi) - n * kLog2Lo;
  // e^r = 1 + r + r^2 q(r), minimax in relative error (3e-9).
  float q = 1.38146106e-3f;
  q = q * r + 8.36871129e-3f;
  q = q * r + 4.16683875e-2f;
  q = q * r + 1.66665207e-1f;
  q = q * r + 4.99999935e-1f;
  const float exp_r = 1.0f + (r + r * r * q);
  // The low bits of `shifted` are n + 64, to be added to the exponent. That may spoil a NaN, which the last term
  // restores.
  const float scaled = bit_cast<float>(bit_cast<uint32_t>(exp_r) + (bit_cast<uint32_t>(shifted) << 23));
  return scaled * 0x1p-64f + 0.0f * clamped;
#endif
}

// To 2.7 ulp.
struct Sigmoid {
  float value;  // 1 / (1 + e^-x)
  float slope;  // value * (1 - value), without cancellation: it is even in x
};

SSIUU_HOST_DEVICE Sigmoid sigmoid(float x) {
  const float e = exp_nonpositive(-fabsf(x));
  const float larger = 1.0f / (1.0f + e);
  const float smaller = e * larger;
  return Sigmoid{x < 0.0f ? smaller : larger, smaller * larger};
}

struct Normal {
  float cdf;
  float pdf;
};

// The standard normal distribution. cdf(-z) = e^(-z^2/2) m(z) for z >= 0, where m falls smoothly from 1/2 like
// 1 / (z sqrt(2 pi)): a polynomial without constant term in t = 1 / (1 + 0.24 z), minimax in relative error (2e-8) on
// [0, 14.5]; beyond, e^(-z^2/2) is 0 in float32. One exponential serves cdf and pdf, and the left tail keeps its
// relative accuracy (4e-6 at -12), which 0.5 * (1 + erf) loses. cdf is within 2.4e-7 everywhere.
SSIUU_HOST_DEVICE Normal standard_normal(float x) {
  const float z = fabsf(x);
  const float e = exp_nonpositive(-0.5f * z * z);
  const float t = 1.0f / (1.0f + 0.24f * z);
  float m = 2.55179495e-2f;
  m = m * t - 1.24589477e-1f;
  m = m * t + 2.05357564e-1f;
  m = m * t - 1.44091970e-1f;
  m = m * t + 1.41287348e-1f;
  m = m * t + 2.82523397e-2f;
  m = m * t + 8.77248402e-2f;
  m = m * t + 8.89431418e-2f;
  m = m * t + 9.58561318e-2f;
  m = m * t + 9.57421337e-2f;
  const float tail = e * (m * t);
  return Normal{x < 0.0f ? tail : 1.0f - tail, 0.398942280f * e};
}

}  // namespace ssiuu
