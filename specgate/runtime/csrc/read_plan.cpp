#include "read_plan.h"

#include <algorithm>

namespace specgate {
namespace {

/// Pieces that end at page boundaries, each at most `chunk` bytes.
void cut(uint64_t begin, uint64_t end, uint64_t chunk, std::vector<Piece>& pieces) {
  while (begin < end) {
    const uint64_t stop = std::min(round_down(begin, kPage) + chunk, end);
    pieces.push_back({begin, stop - begin});
    begin = stop;
  }
}

}  // namespace

bool in_place(const Piece& piece, uintptr_t address, uint64_t memory_alignment) {
  return piece.offset % kPage == 0 && piece.length % kPage == 0 && address % memory_alignment == 0;
}

std::vector<Piece> plan_reads(uint64_t offset, uint64_t length, uintptr_t address, bool direct,
                              uint64_t memory_alignment, uint64_t chunk) {
  std::vector<Piece> pieces;
  const uint64_t end = offset + length;
  const uint64_t body = round_up(offset, kPage), body_end = round_down(end, kPage);
  const bool whole = length <= kBounceWhole && (offset % kPage != 0 || end % kPage != 0);
  if (!direct || whole || body >= body_end || (address + (body - offset)) % memory_alignment != 0) {
    cut(offset, end, chunk, pieces);
    return pieces;
  }
  cut(offset, body, chunk, pieces);
  cut(body, body_end, chunk, pieces);
  cut(body_end, end, chunk, pieces);
  return pieces;
}

}  // namespace specgate
