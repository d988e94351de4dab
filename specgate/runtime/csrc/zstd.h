// zstd from the system's libzstd.so.1, opened when it is first needed: nothing is linked.
//
// For all functions: they throw StoreFailure(Config) where the library is absent, and may be called by any
// thread.
#pragma once

#include <cstddef>
#include <string>

namespace specgate {

/// Whether libzstd.so.1 is there. Never throws.
bool zstd_available();

/// Version of the library, such as 1.5.4.
std::string zstd_version();

/// Bytes that compressing `size` bytes may need at most.
size_t zstd_bound(size_t size);

/// Compresses at a level from 1 to 19 and returns the compressed size. Throws StoreFailure(Config) for
/// another level or if `capacity` is too small.
size_t zstd_compress(void* to, size_t capacity, const void* from, size_t size, int level);

/// Decompresses one frame and returns the decompressed size. Throws StoreFailure(Corrupt) for damaged data or
/// if `capacity` is too small.
size_t zstd_decompress(void* to, size_t capacity, const void* from, size_t size);

}  // namespace specgate
