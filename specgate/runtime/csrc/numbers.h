// Integers that the host knows, written into device memory by a kernel that carries them as its arguments: no copy
// engine, which would be behind the experts' copies, no pinned memory, nothing waited for.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace specgate {

constexpr size_t kNumbersPerLaunch = 480;  // 3840 bytes of the 4096 that a kernel's arguments may take

/// Writes `count` integers to `to` (device memory) on the stream, in as many launches as it takes.
void write_numbers_cuda(int64_t* to, const int64_t* numbers, size_t count, CUstream_st* stream);

}  // namespace specgate
