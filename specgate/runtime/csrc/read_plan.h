// How a segment is cut into reads. Pure: no file is touched.
//
// A direct read (O_DIRECT) needs offset and length in multiples of 4096 and memory aligned to what the device
// asks for. What of a segment cannot have that - an unaligned beginning or end, or all of it if its
// destination lies at the wrong remainder - is read into an aligned buffer, with the bytes around it, and
// copied.
#pragma once

#include <cstdint>
#include <vector>

namespace specgate {

constexpr uint64_t kPage = 4096;
/// Unaligned segments up to this length are read whole through a buffer: one read and a copy beat three
/// reads.
constexpr uint64_t kBounceWhole = 128 << 10;

constexpr uint64_t round_down(uint64_t value, uint64_t unit) { return value / unit * unit; }
constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

/// Bytes [offset, offset + length) of a file, one read.
struct Piece {
  uint64_t offset = 0, length = 0;
};

/// Whether a direct read can go straight to its destination.
bool in_place(const Piece& piece, uintptr_t address, uint64_t memory_alignment);

/// Cuts [offset, offset + length), whose bytes go to `address`, into pieces in ascending order without gaps.
/// None needs more than `chunk` bytes of an aligned buffer.
std::vector<Piece> plan_reads(uint64_t offset, uint64_t length, uintptr_t address, bool direct,
                              uint64_t memory_alignment, uint64_t chunk);

}  // namespace specgate
