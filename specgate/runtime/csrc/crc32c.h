// CRC-32C (Castagnoli), the checksum of blocks: reflected polynomial 0x82F63B78, as in iSCSI (RFC 3720) and
// ext4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specgate {

/// Checksum of `size` bytes; `seed` is the checksum of the bytes before them (0: there are none).
uint32_t crc32c(const void* data, std::size_t size, uint32_t seed = 0);

/// The same by tables alone, on every processor.
uint32_t crc32c_tables(const void* data, std::size_t size, uint32_t seed = 0);

/// Checksum of A followed by B from `crc_a`, `crc_b` and the length of B in bytes: O(log length).
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

/// What crc32c() runs on: "sse4.2" or "tables".
const char* crc32c_backend();

}  // namespace specgate
