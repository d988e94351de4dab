// Decoding on the CPU, and the checks of a layout.
#include "codec.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"
#include "floats.h"

namespace specgate {

namespace {

constexpr uint64_t kMost = uint64_t{1} << 40;

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

struct Extent {
  uint64_t begin, end;
};

/// Throws unless the extents are aligned, inside [0, size) and apart.
void check_extents(std::vector<Extent> extents, uint64_t size, const char* what) {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  uint64_t reached = 0;
  for (const Extent& extent : extents) {
    if (extent.begin % kBlockAlignment != 0) {
      refuse(std::string("a tensor begins at byte ") + std::to_string(extent.begin) + " of a " + what +
             ", which is no multiple of 256: pack the model again");
    }
    if (extent.begin < reached || extent.end > size) {
      refuse(std::string("a tensor lies at bytes ") + std::to_string(extent.begin) + " to " +
             std::to_string(extent.end) + " of a " + what +
             ", outside it or over another one: pack the model again");
    }
    reached = extent.end;
  }
}

uint64_t value_bytes(const BlockFormat& format, const TensorPiece& piece) {
  if (!piece.coded) return piece.rows * piece.cols * size_of(piece.stored);
  if (format.codec != Codec::Int4) return piece.rows * piece.cols;
  return piece.rows * ((piece.cols + format.group - 1) / format.group) * (format.group / 2);
}

uint64_t scale_bytes(const BlockFormat& format, const TensorPiece& piece) {
  if (format.codec != Codec::Int4) return piece.rows * 4;
  return piece.rows * ((piece.cols + format.group - 1) / format.group) * 2;
}

struct ToF32 {
  using Type = float;
  static constexpr float kMax = 3.40282346638528859812e+38f;
  static float of(float v) { return v; }
};
struct ToBf16 {
  using Type = uint16_t;
  static constexpr float kMax = 3.38953138925153547590e+38f;
  static uint16_t of(float v) { return bf16_of_float(v); }
};
struct ToF16 {
  using Type = uint16_t;
  static constexpr float kMax = 65504.0f;
  static uint16_t of(float v) { return f16_of_float(v); }
};

template <typename To>
typename To::Type finish(float product) {
  product = product < To::kMax ? product : To::kMax;
  return To::of(product > -To::kMax ? product : -To::kMax);
}

template <typename To>
void decode_int8(const TensorPiece& p, const std::byte* block, typename To::Type* out) {
  const auto* values = reinterpret_cast<const int8_t*>(block + p.block_offset);
  const auto* scales = reinterpret_cast<const float*>(block + p.scale_offset);
  for (uint64_t r = 0; r < p.rows; ++r) {
    const float scale = scales[r];
    const int8_t* row = values + r * p.cols;
    typename To::Type* target = out + r * p.cols;
    for (uint64_t c = 0; c < p.cols; ++c) target[c] = finish<To>(static_cast<float>(row[c]) * scale);
  }
}

template <typename To>
void decode_fp8(const TensorPiece& p, const std::byte* block, typename To::Type* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(block + p.block_offset);
  const auto* scales = reinterpret_cast<const float*>(block + p.scale_offset);
  for (uint64_t r = 0; r < p.rows; ++r) {
    const float scale = scales[r];
    const uint8_t* row = values + r * p.cols;
    typename To::Type* target = out + r * p.cols;
    for (uint64_t c = 0; c < p.cols; ++c) target[c] = finish<To>(float_of_e4m3(row[c]) * scale);
  }
}

template <typename To>
void decode_int4(const TensorPiece& p, uint64_t group, const std::byte* block, typename To::Type* out) {
  const uint64_t groups = (p.cols + group - 1) / group;
  const auto* values = reinterpret_cast<const uint8_t*>(block + p.block_offset);
  const auto* scales = reinterpret_cast<const uint16_t*>(block + p.scale_offset);
  for (uint64_t r = 0; r < p.rows; ++r) {
    for (uint64_t g = 0; g < groups; ++g) {
      const float scale = float_of_f16(scales[r * groups + g]);
      const uint8_t* codes = values + (r * groups + g) * (group / 2);
      typename To::Type* target = out + r * p.cols + g * group;
      const uint64_t count = std::min(group, p.cols - g * group);
      for (uint64_t i = 0; i < count / 2; ++i) {
        target[2 * i] = finish<To>(static_cast<float>((codes[i] & 15) - 8) * scale);
        target[2 * i + 1] = finish<To>(static_cast<float>((codes[i] >> 4) - 8) * scale);
      }
      if (count % 2) target[count - 1] = finish<To>(static_cast<float>((codes[count / 2] & 15) - 8) * scale);
    }
  }
}

/// An uncoded piece of another type than the slot's.
template <typename To>
void cast(const TensorPiece& p, const std::byte* block, typename To::Type* out) {
  const std::byte* from = block + p.block_offset;
  const uint64_t count = p.rows * p.cols;
  if (p.stored == DType::F32) {
    const auto* values = reinterpret_cast<const float*>(from);
    for (uint64_t i = 0; i < count; ++i) out[i] = To::of(values[i]);
  } else if (p.stored == DType::BF16) {
    const auto* values = reinterpret_cast<const uint16_t*>(from);
    for (uint64_t i = 0; i < count; ++i) out[i] = To::of(float_of_bf16(values[i]));
  } else {
    const auto* values = reinterpret_cast<const uint16_t*>(from);
    for (uint64_t i = 0; i < count; ++i) out[i] = To::of(float_of_f16(values[i]));
  }
}

template <typename To>
void decode_piece(const BlockFormat& format, const TensorPiece& p, const std::byte* block, std::byte* slot) {
  auto* out = reinterpret_cast<typename To::Type*>(slot + p.slot_offset);
  if (!p.coded) return cast<To>(p, block, out);
  switch (format.codec) {
    case Codec::Int8:
      return decode_int8<To>(p, block, out);
    case Codec::Int4:
      return decode_int4<To>(p, format.group, block, out);
    default:
      return decode_fp8<To>(p, block, out);
  }
}

}  // namespace

void validate(const BlockFormat& format) {
  const bool int4 = format.codec == Codec::Int4;
  if (int4 ? format.group != 32 && format.group != 64 : format.group != 0) {
    refuse("group=" + std::to_string(format.group) +
           " is not possible: 32 or 64 for int4, 0 for every other codec");
  }
  if (format.pieces.empty()) refuse("an expert without tensors has no layout: name at least one");
  if (format.slot_bytes % kBlockAlignment != 0 || format.block_bytes % kBlockAlignment != 0) {
    refuse("slots of " + std::to_string(format.slot_bytes) + " and blocks of " +
           std::to_string(format.block_bytes) + " bytes must be multiples of 256: pack the model again");
  }
  std::vector<Extent> in_slot, in_block;
  for (const TensorPiece& p : format.pieces) {
    if (p.rows == 0 || p.cols == 0 || p.rows > kMost || p.cols > kMost / p.rows / 4) {
      refuse("a tensor of " + std::to_string(p.rows) + " x " + std::to_string(p.cols) +
             " values is empty or too large: pack the model again");
    }
    if (p.coded && format.codec == Codec::None) {
      refuse("a tensor is coded though the codec is none: pack the model again");
    }
    if (p.slot_offset > kMost || p.block_offset > kMost || p.scale_offset > kMost) {
      refuse("a tensor begins beyond any slot: pack the model again");
    }
    in_slot.push_back({p.slot_offset, p.slot_offset + p.rows * p.cols * size_of(p.dtype)});
    in_block.push_back({p.block_offset, p.block_offset + value_bytes(format, p)});
    if (p.coded) in_block.push_back({p.scale_offset, p.scale_offset + scale_bytes(format, p)});
  }
  check_extents(std::move(in_slot), format.slot_bytes, "slot");
  check_extents(std::move(in_block), format.block_bytes, "block");
}

bool is_plain(const BlockFormat& format) {
  return format.slot_bytes == format.block_bytes &&
         std::all_of(format.pieces.begin(), format.pieces.end(), [](const TensorPiece& p) {
           return !p.coded && p.dtype == p.stored && p.slot_offset == p.block_offset;
         });
}

void decode_block(const BlockFormat& format, const std::byte* block, std::byte* slot) {
  for (const TensorPiece& p : format.pieces) {
    if (!p.coded && p.dtype == p.stored) {
      std::memcpy(slot + p.slot_offset, block + p.block_offset, p.rows * p.cols * size_of(p.dtype));
    } else if (p.dtype == DType::F32) {
      decode_piece<ToF32>(format, p, block, slot);
    } else if (p.dtype == DType::BF16) {
      decode_piece<ToBf16>(format, p, block, slot);
    } else {
      decode_piece<ToF16>(format, p, block, slot);
    }
  }
}

}  // namespace specgate
