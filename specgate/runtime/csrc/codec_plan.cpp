#include "codec_plan.h"

#include <string>

#include "error.h"

namespace specgate::kernels {

namespace {

constexpr uint64_t kMostValues = uint64_t{1} << 30;

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

Source source_of(const BlockFormat& format, const TensorPiece& piece) {
  if (!piece.coded) {
    return piece.stored == DType::F32    ? Source::F32
           : piece.stored == DType::BF16 ? Source::BF16
                                         : Source::F16;
  }
  return format.codec == Codec::Int8   ? Source::Int8
         : format.codec == Codec::Int4 ? Source::Int4
                                       : Source::Fp8;
}

}  // namespace

Divisor Divisor::by(uint32_t d) {
  Divisor out{1, 0};
  while ((uint64_t{1} << out.shift) < d) ++out.shift;
  out.multiplier = static_cast<uint32_t>(((((uint64_t{1} << out.shift) - d) << 32) / d) + 1);
  return out;
}

Work plan(const BlockFormat& format, DType to) {
  Work work{};
  for (const TensorPiece& piece : format.pieces) {
    if (piece.dtype != to) continue;
    if (work.pieces == kMaxPieces) {
      refuse("an expert of more than " + std::to_string(kMaxPieces) +
             " tensors cannot be decoded on a GPU: use "
             "codec=none with the checkpoint's dtype");
    }
    if (piece.rows * piece.cols >= kMostValues) {
      refuse("a tensor of " + std::to_string(piece.rows) + " x " + std::to_string(piece.cols) +
             " values is too large to be decoded on a GPU: use codec=none with the checkpoint's dtype");
    }
    PlannedPiece& p = work.piece[work.pieces++];
    p.source = source_of(format, piece);
    p.from = piece.block_offset;
    p.scales = piece.scale_offset;
    p.to = piece.slot_offset;
    p.count = static_cast<uint32_t>(piece.rows * piece.cols);
    p.cols = static_cast<uint32_t>(piece.cols);
    p.row = Divisor::by(p.cols);
    const Tile tile = tile_of(p.source, to);
    uint64_t stored = p.count;
    if (p.source == Source::Int4) {
      p.group = format.group;
      p.group_shift = format.group == 32 ? 5 : 6;
      p.gathered = piece.cols % format.group != 0;
      stored = piece.rows * ((piece.cols + format.group - 1) / format.group) * format.group;
    } else if (has_scale(p.source)) {
      p.gathered = piece.cols % tile.values != 0;
    }
    p.value_bytes = static_cast<uint32_t>(stored * bits_of(p.source) / 8);
    p.first_tile = work.tiles;
    work.tiles += (p.count + tile.total - 1) / tile.total;
  }
  return work;
}

}  // namespace specgate::kernels
