// Codecs of expert weights: what an encoded block holds, and how it becomes a slot.
//
// The layout comes from specgate/runtime/layout.py; specgate/runtime/codecs.py states the same decoding in
// torch, and both give the same bits. Decoding multiplies in float32, cuts off what the slot's type cannot
// hold, and rounds to the nearest, ties to even. All values are little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define SPECGATE_HOST_DEVICE __host__ __device__
#else
#define SPECGATE_HOST_DEVICE
#endif

struct CUstream_st;  // what cudaStream_t points to

namespace specgate {

enum class Codec : uint32_t { None, Int8, Int4, Fp8 };
enum class DType : uint32_t { F32, BF16, F16 };

/// Pieces and scales begin at multiples of it; slots and blocks are as long as some.
constexpr uint64_t kBlockAlignment = 256;

SPECGATE_HOST_DEVICE constexpr uint64_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

/// One tensor of an expert: a matrix, row after row without gaps.
struct TensorPiece {
  uint64_t rows = 0, cols = 0;
  DType dtype = DType::F32;   ///< in the slot
  DType stored = DType::F32;  ///< in the block, if not coded
  bool coded = false;         ///< biases never are
  uint64_t slot_offset = 0;   ///< bytes from the start of the slot
  uint64_t block_offset = 0;  ///< bytes from the start of the block
  uint64_t scale_offset = 0;  ///< of the scales, in the block
};

/// Where the pieces of every expert of a shape class lie.
///
/// Int8, Fp8 (e4m3fn): rows * cols bytes, then a float32 scale per row. Int4: groups of `group` values along
/// a row, two values a byte, the first in the low half, plus 8; each row is filled up to whole groups; then a
/// float16 scale per group.
struct BlockFormat {
  Codec codec = Codec::None;
  uint32_t group = 0;  ///< 32 or 64 for Int4, else 0
  std::vector<TensorPiece> pieces;
  uint64_t slot_bytes = 0, block_bytes = 0;
};

/// Throws StoreFailure(Config) unless each piece lies inside slot and block, aligned, and none covers
/// another.
void validate(const BlockFormat& format);

/// Whether a block is a slot byte for byte, so that decoding it is a copy.
bool is_plain(const BlockFormat& format);

/// Decodes on the CPU. Bytes of the slot that belong to no piece are left as they are.
void decode_block(const BlockFormat& format, const std::byte* block, std::byte* slot);

#ifdef SPECGATE_CUDA
/// Decodes on the current device, by one kernel on `stream`; block and slot are device (or mapped) memory
/// aligned to 16 bytes. The host does not wait. Throws StoreFailure when the launch fails.
void decode_block_cuda(const BlockFormat& format, const std::byte* block, std::byte* slot,
                       CUstream_st* stream);

/// The same for several blocks of one format: a launch for every 64 of them.
void decode_blocks_cuda(const BlockFormat& format, const std::byte* const* blocks, std::byte* const* slots,
                        size_t count, CUstream_st* stream);
#endif

}  // namespace specgate
