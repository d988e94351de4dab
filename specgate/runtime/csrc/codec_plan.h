// How the decoding kernels (codec_kernels.cuh) share the work: pieces cut into tiles, one tile per warp.
//
// Knows no CUDA, so that it is tested without.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"

namespace specgate::kernels {

constexpr uint32_t kWarps = 8;      ///< of a thread block
constexpr uint32_t kMaxPieces = 8;  ///< of an expert
constexpr uint32_t kMaxJobs = 64;   ///< blocks decoded by one launch
constexpr uint32_t kStage = 1024;   ///< bytes of shared memory per warp

/// n / d for n < 2^31 by a multiplication (Granlund & Montgomery, "Division by invariant integers using
/// multiplication", PLDI 1994).
struct Divisor {
  uint32_t multiplier, shift;

  static Divisor by(uint32_t d);
  SPECGATE_HOST_DEVICE uint32_t divide(uint32_t n) const {
#ifdef __CUDA_ARCH__
    return (__umulhi(multiplier, n) + n) >> shift;
#else
    return (static_cast<uint32_t>((static_cast<uint64_t>(multiplier) * n) >> 32) + n) >> shift;
#endif
  }
};

enum class Source : uint32_t { Int8, Int4, Fp8, F32, BF16, F16 };

SPECGATE_HOST_DEVICE constexpr uint32_t bits_of(Source source) {
  if (source == Source::Int4) return 4;
  if (source == Source::F32) return 32;
  return source == Source::BF16 || source == Source::F16 ? 16 : 8;
}
SPECGATE_HOST_DEVICE constexpr bool has_scale(Source source) { return bits_of(source) < 16; }
SPECGATE_HOST_DEVICE constexpr bool is_same(Source source, DType to) {
  return (source == Source::F32 && to == DType::F32) || (source == Source::BF16 && to == DType::BF16) ||
         (source == Source::F16 && to == DType::F16);
}

/// How values of one format are cut into tiles on their way to a slot's type.
struct Tile {
  uint32_t values;  ///< per lane and round: 16 bytes of the slot
  uint32_t bytes;   ///< that these are in the block
  uint32_t loads;   ///< of 16 bytes per lane
  uint32_t rounds;
  uint32_t total;  ///< values of a tile
};

SPECGATE_HOST_DEVICE constexpr Tile tile_of(Source source, DType to) {
  const uint32_t values = 16 / static_cast<uint32_t>(size_of(to)), bytes = values * bits_of(source) / 8;
  const uint32_t loads = bytes > 16 ? bytes / 16 : 1, rounds = loads * 16 / bytes;
  return {values, bytes, loads, rounds, rounds * 32 * values};
}

struct PlannedPiece {
  uint64_t from, scales, to;    ///< byte offsets in block, block and slot
  uint32_t count, cols;         ///< values; of a row
  uint32_t value_bytes;         ///< of all values in the block
  uint32_t first_tile;          ///< its tiles follow those of the piece before it
  uint32_t group, group_shift;  ///< Int4
  Divisor row;                  ///< divides by cols
  Source source;
  bool gathered;  ///< 16 bytes of the slot may span rows: values are loaded one by one
};

struct BlockJob {
  const unsigned char* block;
  unsigned char* slot;
};

/// What one launch does; a kernel's argument, so less than 4 KiB.
struct Work {
  uint32_t pieces, tiles;
  PlannedPiece piece[kMaxPieces];
  BlockJob job[kMaxJobs];
};
static_assert(sizeof(Work) <= 4000, "a kernel's arguments are limited to 4 KiB");

/// The pieces of a format that go to slots of type `to`, without jobs. Throws StoreFailure(Config) for more
/// pieces or values than a kernel takes.
Work plan(const BlockFormat& format, DType to);

}  // namespace specgate::kernels
