// Rounding a float to the type in which it is stored: to nearest, or up or down at random so that the mean is kept.
#pragma once

#include "ssiuu/types.h"

namespace ssiuu {

// A bijection of 32 bits that spreads every input bit over the output (Chris Wellons, "lowbias32").
SSIUU_HOST_DEVICE uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// What the random bits of one tensor at one step come from.
SSIUU_HOST_DEVICE uint32_t rounding_key(uint32_t seed, uint32_t step) { return mix_bits(mix_bits(seed) ^ step); }

// 32 random bits of one element. `stream` 0 and 1 are independent.
SSIUU_HOST_DEVICE uint32_t random_bits(uint32_t key, int64_t index, uint32_t stream) {
  const auto low = static_cast<uint32_t>(index);
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  return mix_bits(mix_bits(key ^ low) ^ (2u * high + stream));
}

// The 16 low bits of `bits` decide; infinity and NaN stay what they are.
template <class T>
SSIUU_HOST_DEVICE T round_at_random(float x, uint32_t bits);

template <>
SSIUU_HOST_DEVICE float round_at_random<float>(float x, uint32_t) {
  return x;
}

template <>
SSIUU_HOST_DEVICE BFloat16 round_at_random<BFloat16>(float x, uint32_t bits) {
  const uint32_t exact = bit_cast<uint32_t>(x);
  const bool finite = (exact & 0x7f800000u) != 0x7f800000u;
  const uint32_t rounded = finite ? exact + (bits & 0xffffu) : exact;
  const uint32_t quiet_nan = (exact & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u;
  return BFloat16{static_cast<uint16_t>((rounded >> 16) | quiet_nan)};
}

}  // namespace ssiuu
