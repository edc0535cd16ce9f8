// Element types, their codes, and conversion to and from float. Shared by host and device code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SSIUU_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SSIUU_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ssiuu {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kReluSquared = 4 };

struct BFloat16 {
  uint16_t bits;
};

// Rows [start, end) of the flattened [T, D] that belong to one sample.
struct Segment {
  int32_t start;
  int32_t end;
};

SSIUU_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
SSIUU_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

SSIUU_HOST_DEVICE float to_float(float x) { return x; }

SSIUU_HOST_DEVICE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
SSIUU_HOST_DEVICE T from_float(float x);

template <>
SSIUU_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

// Round to nearest even, for which the device has an instruction. Without the select the rounding increment could carry
// a NaN's payload over into infinity; it is made in 32 bits, for GCC would narrow one of 16 to and fro.
template <>
SSIUU_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  return BFloat16{static_cast<uint16_t>((x != x ? quiet_nan : rounded) >> 16)};
#endif
}

}  // namespace ssiuu
