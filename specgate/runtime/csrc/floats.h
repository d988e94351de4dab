// Conversions between float32 and the smaller formats, by integer arithmetic: the same bits on every
// processor.
//
// Rounding is to the nearest, ties to even; what is too large becomes infinite. NaN becomes 0x7FFF, as
// NVIDIA's conversion instructions have it. No branches, so that loops over them vectorise.
#pragma once

#include <bit>
#include <cstdint>

namespace specgate {

inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of_float(float value) { return std::bit_cast<uint32_t>(value); }

inline float float_of_bf16(uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t bf16_of_float(float value) {
  const uint32_t x = bits_of_float(value);
  const uint32_t rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((x & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded);
}

inline float float_of_f16(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, rest = x & 0x7FFFu;
  const uint32_t normal = (rest << 13) + 0x38000000u;                             // exponent bias 15 -> 127
  const uint32_t special = (rest << 13) | 0x7F800000u;                            // infinity, NaN
  const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;  // exact
  const uint32_t finite = rest < 0x0400u ? bits_of_float(small) : normal;
  return float_of_bits(sign | (rest >= 0x7C00u ? special : finite));
}

inline uint16_t f16_of_float(float value) {
  const uint32_t x = bits_of_float(value), sign = (x >> 16) & 0x8000u, rest = x & 0x7FFFFFFFu;
  // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 leaves it in the last bits of the sum, rounded.
  const uint32_t small = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (rest - 0x38000000u + 0x0FFFu + ((rest >> 13) & 1u)) >> 13;
  uint32_t result = rest < 0x38800000u ? small : normal;
  result = rest >= 0x47800000u ? 0x7C00u : result;  // 65536 and more; from 65520 the rounding above says so
  return static_cast<uint16_t>(rest > 0x7F800000u ? 0x7FFFu : (sign | result));
}

/// e4m3fn. The codes 0x7F and 0xFF are its NaNs; no encoder writes them.
inline float float_of_e4m3(uint8_t x) {
  const float magnitude = float_of_bits((x & 0x7Fu) << 20) * 0x1p120f;  // exponent bias 7 -> 127; exact
  return float_of_bits(bits_of_float(magnitude) | (static_cast<uint32_t>(x & 0x80u) << 24));
}

}  // namespace specgate
