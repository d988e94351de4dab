// The decoding kernel. codec_cuda.cu launches it; tests/native/test_codec_kernels.cpp runs it on the CPU.
//
// A warp takes one tile: each lane loads 16 bytes of values (32 where float32 shrinks), the warp lays them
// out in shared memory and goes over the tile in rounds. In each, every lane decodes what makes 16 bytes of
// the slot and stores them beside its neighbours'. So loads and stores are whole, coalesced and 16 bytes
// wide, whatever the ratio of the two formats. Where 16 bytes of the slot may span rows, values are loaded
// one by one.
//
// Whoever includes it has defined, for its processor: float_of_half_bits, pack_bf16, pack_f16, load_once,
// load_cached and sync_warp.
#pragma once

#include "codec_plan.h"

#ifdef __CUDACC__
#define SPECGATE_UNROLL _Pragma("unroll")
#else
#define SPECGATE_UNROLL
#endif

namespace specgate::kernels {

/// Value `k` of a chunk as it is stored.
template <Source S>
__device__ inline uint32_t raw_of(const uint32_t* words, uint32_t k) {
  constexpr uint32_t kBits = bits_of(S), kPerWord = 32 / kBits;
  if constexpr (kBits == 32) return words[k];
  return (words[k / kPerWord] >> (k % kPerWord * kBits)) & ((uint64_t{1} << kBits) - 1);
}

/// An integer below 2^23 less `zero`: 2^23 + n has n in its last bits, so an OR and a subtraction convert it.
__device__ inline float integer(uint32_t n, float zero) {
  return __uint_as_float(0x4B000000u | n) - (8388608.0f + zero);
}

/// What a stored value is, before its scale.
template <Source S>
__device__ inline float value_of(uint32_t raw) {
  if constexpr (S == Source::Int4) return integer(raw, 8.0f);
  if constexpr (S == Source::Int8) return integer(raw ^ 0x80u, 128.0f);
  if constexpr (S == Source::Fp8) {  // e4m3fn, in software: devices before 8.9 have no instruction for it
    const float magnitude = __uint_as_float((raw & 0x7Fu) << 20) * 0x1p120f;
    return __uint_as_float(__float_as_uint(magnitude) | (raw & 0x80u) << 24);
  }
  if constexpr (S == Source::F32) return __uint_as_float(raw);
  if constexpr (S == Source::BF16) return __uint_as_float(raw << 16);
  if constexpr (S == Source::F16) return float_of_half_bits(static_cast<uint16_t>(raw));
}

/// The scale of value `i` of the piece.
template <Source S>
__device__ inline float scale_of(const PlannedPiece& p, const unsigned char* block, uint32_t i) {
  if constexpr (S == Source::Int4) {
    uint32_t place = i;
    if (p.gathered) {  // rows are filled up to whole groups
      const uint32_t row = p.row.divide(i), groups = (p.cols + p.group - 1) >> p.group_shift;
      place = (row * groups << p.group_shift) + i - row * p.cols;
    }
    const auto* scales = reinterpret_cast<const uint16_t*>(block + p.scales);
    return float_of_half_bits(load_cached(scales + (place >> p.group_shift)));
  } else {
    return load_cached(reinterpret_cast<const float*>(block + p.scales) + p.row.divide(i));
  }
}

template <DType To>
__device__ inline float scaled(float value, float scale) {
  constexpr float kLargest = To == DType::F32    ? 3.40282346638528859812e+38f
                             : To == DType::BF16 ? 3.38953138925153547590e+38f
                                                 : 65504.0f;
  return fminf(fmaxf(value * scale, -kLargest), kLargest);
}

/// Value `i` of a piece whose rows do not fit whole chunks.
template <Source S, DType To>
__device__ inline float gather(const PlannedPiece& p, const unsigned char* block, uint32_t i) {
  const unsigned char* from = block + p.from;
  uint32_t raw = 0;
  if constexpr (S == Source::Int4) {
    const uint32_t row = p.row.divide(i), groups = (p.cols + p.group - 1) >> p.group_shift;
    const uint32_t place = (row * groups << p.group_shift) + i - row * p.cols;
    raw = (from[place / 2] >> (place % 2 * 4)) & 15u;
  } else {
    raw = from[i];
  }
  return scaled<To>(value_of<S>(raw), scale_of<S>(p, block, i));
}

/// Stores the four words of values i, i + 1, ... of the piece; what is beyond its end is dropped.
template <DType To>
__device__ inline void store(const PlannedPiece& p, unsigned char* slot, uint32_t i, const uint32_t* words) {
  constexpr uint32_t kValues = 16 / static_cast<uint32_t>(size_of(To));
  if (i + kValues <= p.count) {
    *reinterpret_cast<uint4*>(slot + p.to + static_cast<uint64_t>(i) * size_of(To)) =
        make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  SPECGATE_UNROLL
  for (uint32_t k = 0; k < kValues; ++k) {
    if (i + k >= p.count) return;
    if constexpr (To == DType::F32) {
      reinterpret_cast<uint32_t*>(slot + p.to)[i + k] = words[k];
    } else {
      reinterpret_cast<uint16_t*>(slot + p.to)[i + k] = static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16));
    }
  }
}

template <DType To>
__device__ inline void pack(const float* values, uint32_t* words) {
  SPECGATE_UNROLL
  for (uint32_t w = 0; w < 4; ++w) {
    if constexpr (To == DType::F32) {
      words[w] = __float_as_uint(values[w]);
    } else if constexpr (To == DType::BF16) {
      words[w] = pack_bf16(values[2 * w], values[2 * w + 1]);
    } else {
      words[w] = pack_f16(values[2 * w], values[2 * w + 1]);
    }
  }
}

/// Bytes [at, at + kBytes) of the warp's shared memory, as words.
template <uint32_t kBytes>
__device__ inline void load_chunk(const unsigned char* at, uint32_t* words) {
  if constexpr (kBytes == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(at);
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(at);
  } else if constexpr (kBytes == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    words[0] = two.x, words[1] = two.y;
  } else {
    SPECGATE_UNROLL
    for (uint32_t w = 0; w < kBytes / 4; w += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(at)[w / 4];
      words[w] = four.x, words[w + 1] = four.y, words[w + 2] = four.z, words[w + 3] = four.w;
    }
  }
}

template <Source S, DType To>
__device__ inline void run_tile(const PlannedPiece& p, const BlockJob& job, uint32_t number, uint32_t lane,
                                unsigned char* stage) {
  constexpr Tile kTile = tile_of(S, To);
  static_assert(kTile.loads * 512 <= kStage, "a tile fits its warp's shared memory");
  if (!p.gathered) {
    SPECGATE_UNROLL
    for (uint32_t load = 0; load < kTile.loads; ++load) {
      const uint32_t at = (load * 32 + lane) * 16, offset = number * kTile.loads * 512 + at;
      if (offset < p.value_bytes) {  // the last load may reach into what fills the piece up to 256 bytes
        const auto* from = reinterpret_cast<const uint4*>(job.block + p.from + offset);
        *reinterpret_cast<uint4*>(stage + at) = load_once(from);
      }
    }
    sync_warp();
  }
  SPECGATE_UNROLL
  for (uint32_t round = 0; round < kTile.rounds; ++round) {
    const uint32_t chunk = round * 32 + lane, i = number * kTile.total + chunk * kTile.values;
    if (i >= p.count) break;
    uint32_t words[4];
    float values[kTile.values];
    if constexpr (is_same(S, To)) {
      load_chunk<16>(stage + chunk * 16, words);
    } else if (!p.gathered) {
      uint32_t stored[(kTile.bytes + 3) / 4];
      load_chunk<kTile.bytes>(stage + chunk * kTile.bytes, stored);
      float scale = 1.0f;
      if constexpr (has_scale(S)) scale = scale_of<S>(p, job.block, i);
      SPECGATE_UNROLL
      for (uint32_t k = 0; k < kTile.values; ++k) {
        values[k] = value_of<S>(raw_of<S>(stored, k));
        if constexpr (has_scale(S)) values[k] = scaled<To>(values[k], scale);
      }
      pack<To>(values, words);
    } else if constexpr (has_scale(S)) {
      SPECGATE_UNROLL
      for (uint32_t k = 0; k < kTile.values; ++k) {
        values[k] = gather<S, To>(p, job.block, i + k < p.count ? i + k : i);
      }
      pack<To>(values, words);
    }
    store<To>(p, job.slot, i, words);
  }
}

/// Decodes all pieces of the jobs' blocks. Grid: (tiles / kWarps, jobs); thread block: 32 * kWarps.
template <Source Coded, DType To>
__global__ void decode_kernel(const Work work) {
  __shared__ __align__(16) unsigned char stage[kWarps][kStage];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t tile = blockIdx.x * kWarps + warp;
  if (tile >= work.tiles) return;
  uint32_t at = 0;
  while (at + 1 < work.pieces && tile >= work.piece[at + 1].first_tile) ++at;
  const PlannedPiece& p = work.piece[at];
  const BlockJob& job = work.job[blockIdx.y];
  const uint32_t number = tile - p.first_tile;
  switch (p.source) {
    case Source::F32:
      return run_tile<Source::F32, To>(p, job, number, lane, stage[warp]);
    case Source::BF16:
      return run_tile<Source::BF16, To>(p, job, number, lane, stage[warp]);
    case Source::F16:
      return run_tile<Source::F16, To>(p, job, number, lane, stage[warp]);
    default:
      return run_tile<Coded, To>(p, job, number, lane, stage[warp]);
  }
}

}  // namespace specgate::kernels
