// What the tests of the codecs share: formats laid out by hand, and decoding written another way, in double
// precision and by search for the nearest value.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "codec.h"

namespace specgate::test {

inline double from_bits(uint16_t bits, DType type) {
  const int mantissa = type == DType::BF16 ? 7 : 10, bias = type == DType::BF16 ? 127 : 15;
  const int exponent = (bits & 0x7FFF) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                         : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/// The nearest finite 16-bit number by bisection, ties to the even one. `value` must not be beyond the
/// largest.
inline uint16_t nearest(double value, DType type) {
  const double magnitude = std::fabs(value);
  uint16_t low = 0, high = type == DType::BF16 ? 0x7F7F : 0x7BFF;
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (from_bits(middle, type) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - from_bits(low, type), above = from_bits(high, type) - magnitude;
  const uint16_t best = below < above ? low : above < below ? high : low % 2 ? high : low;
  return static_cast<uint16_t>(best | (std::signbit(value) ? 0x8000 : 0));
}

inline double e4m3(uint8_t x) {
  const int exponent = (x >> 3) & 15, fraction = x & 7;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(fraction + 8, exponent - 10);
  return x & 0x80 ? -magnitude : magnitude;
}

inline double largest(DType type) {
  return type == DType::F32 ? std::numeric_limits<float>::max()
                            : from_bits(type == DType::BF16 ? 0x7F7F : 0x7BFF, type);
}

inline uint64_t up(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

inline uint64_t groups(uint64_t cols, uint64_t group) { return (cols + group - 1) / group; }

/// Lays out matrices (and, with cols only, a bias behind each) as specgate/runtime/layout.py does.
inline BlockFormat make_format(Codec codec, uint32_t group, DType stored, DType dtype,
                               const std::vector<std::pair<uint64_t, uint64_t>>& shapes, bool biases) {
  BlockFormat format;
  format.codec = codec;
  format.group = group;
  for (const auto& [rows, cols] : shapes) {
    for (int bias = 0; bias <= (biases ? 1 : 0); ++bias) {
      TensorPiece p;
      p.rows = bias ? 1 : rows;
      p.cols = cols;
      p.dtype = dtype;
      p.stored = stored;
      p.coded = codec != Codec::None && !bias;
      p.slot_offset = format.slot_bytes;
      p.block_offset = format.block_bytes;
      uint64_t values = p.rows * p.cols * size_of(stored), scales = 0;
      if (p.coded) {
        values = codec == Codec::Int4 ? p.rows * groups(cols, group) * group / 2 : p.rows * cols;
        scales = codec == Codec::Int4 ? p.rows * groups(cols, group) * 2 : p.rows * 4;
        p.scale_offset = p.block_offset + up(values);
      }
      format.slot_bytes += up(p.rows * p.cols * size_of(dtype));
      format.block_bytes += up(values) + up(scales);
      format.pieces.push_back(p);
    }
  }
  return format;
}

/// Random bytes, but for codes that no encoder writes and for values that are not finite.
inline std::vector<std::byte> random_block(const BlockFormat& format, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> block(format.block_bytes);
  for (std::byte& b : block) b = static_cast<std::byte>(random());
  for (const TensorPiece& p : format.pieces) {
    if (!p.coded) {
      for (uint64_t i = 0; i < p.rows * p.cols; ++i) {
        if (p.stored == DType::F32) {  // small, large and halfway between two smaller numbers
          const float value =
              std::ldexp(1.0f + static_cast<float>(random() % 4097) / 4096, random() % 60 - 30);
          const float with_sign = random() % 2 ? value : -value;
          std::memcpy(block.data() + p.block_offset + 4 * i, &with_sign, 4);
        } else {
          auto bits = static_cast<uint16_t>(random());
          const uint16_t special = p.stored == DType::BF16 ? 0x7F80 : 0x7C00;
          if ((bits & special) == special) bits ^= 0x4000;
          std::memcpy(block.data() + p.block_offset + 2 * i, &bits, 2);
        }
      }
      continue;
    }
    if (format.codec == Codec::Fp8) {
      for (uint64_t i = 0; i < p.rows * p.cols; ++i) {
        std::byte& b = block[p.block_offset + i];
        if ((b & std::byte{0x7F}) == std::byte{0x7F}) b ^= std::byte{1};
      }
    }
    const uint64_t count = format.codec == Codec::Int4 ? p.rows * groups(p.cols, format.group) : p.rows;
    for (uint64_t i = 0; i < count; ++i) {
      if (format.codec == Codec::Int4) {
        const auto bits =
            static_cast<uint16_t>(random() % 0x7C00);  // any finite float16 that is not negative
        std::memcpy(block.data() + p.scale_offset + 2 * i, &bits, 2);
      } else {
        // Mostly like those of weights; some below the normal range, and some that overshoot a slot's type.
        const int exponent = i % 7 == 3 ? -145 : i % 7 == 5 ? 124 : static_cast<int>(random() % 30) - 20;
        const float scale = std::ldexp(1.0f + static_cast<float>(random() % 1000) / 1000, exponent);
        std::memcpy(block.data() + p.scale_offset + 4 * i, &scale, 4);
      }
    }
  }
  return block;
}

/// What value (row, col) of a piece is, exactly as stated in codec.h.
inline double decoded(const BlockFormat& format, const TensorPiece& p, const std::byte* block, uint64_t row,
                      uint64_t col) {
  const std::byte* values = block + p.block_offset;
  if (!p.coded) {
    const uint64_t i = row * p.cols + col;
    if (p.stored == DType::F32) {
      float value;
      std::memcpy(&value, values + 4 * i, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, values + 2 * i, 2);
    return from_bits(bits, p.stored);
  }
  double value = 0, scale = 0;
  if (format.codec == Codec::Int4) {
    const uint64_t per_row = groups(p.cols, format.group), place = row * per_row * format.group + col;
    const auto pair = static_cast<int>(values[place / 2]);
    value = (place % 2 ? pair >> 4 : pair & 15) - 8;
    uint16_t bits;
    std::memcpy(&bits, block + p.scale_offset + 2 * (row * per_row + col / format.group), 2);
    scale = from_bits(bits, DType::F16);
  } else {
    const auto byte = static_cast<uint8_t>(values[row * p.cols + col]);
    value = format.codec == Codec::Fp8 ? e4m3(byte) : byte < 128 ? byte : byte - 256;
    float stored;
    std::memcpy(&stored, block + p.scale_offset + 4 * row, 4);
    scale = stored;
  }
  // The product is exact in double precision; the codec rounds it to float32 first.
  const double product = static_cast<float>(value * scale);
  return std::fmin(std::fmax(product, -largest(p.dtype)), largest(p.dtype));
}

/// The slot that a block becomes; bytes that belong to no piece are `fill`.
inline std::vector<std::byte> expected_slot(const BlockFormat& format, const std::byte* block,
                                            std::byte fill) {
  std::vector<std::byte> slot(format.slot_bytes, fill);
  for (const TensorPiece& p : format.pieces) {
    for (uint64_t row = 0; row < p.rows; ++row) {
      for (uint64_t col = 0; col < p.cols; ++col) {
        const double value = decoded(format, p, block, row, col);
        std::byte* at = slot.data() + p.slot_offset + (row * p.cols + col) * size_of(p.dtype);
        if (p.dtype == DType::F32) {
          const auto single = static_cast<float>(value);
          std::memcpy(at, &single, 4);
        } else {
          // A cast overflows to infinity half a step beyond the largest value; coded values were cut off
          // before.
          const bool beyond = p.dtype == DType::F16 && std::fabs(value) >= 65520;
          const auto infinity = static_cast<uint16_t>(std::signbit(value) ? 0xFC00 : 0x7C00);
          const double inside = std::fmin(std::fmax(value, -largest(p.dtype)), largest(p.dtype));
          const uint16_t bits = beyond ? infinity : nearest(inside, p.dtype);
          std::memcpy(at, &bits, 2);
        }
      }
    }
  }
  return slot;
}

}  // namespace specgate::test
