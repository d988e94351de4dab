#include "zstd.h"

#include <dlfcn.h>

#include <memory>

#include "error.h"

namespace specgate {

namespace {

// Prototypes of the stable part of zstd.h, version 1.4 and later.
struct Library {
  size_t (*bound)(size_t) = nullptr;
  unsigned (*is_error)(size_t) = nullptr;
  const char* (*error_name)(size_t) = nullptr;
  const char* (*version)() = nullptr;
  void* (*make_compressor)() = nullptr;
  size_t (*free_compressor)(void*) = nullptr;
  size_t (*compress)(void*, void*, size_t, const void*, size_t, int) = nullptr;
  void* (*make_decompressor)() = nullptr;
  size_t (*free_decompressor)(void*) = nullptr;
  size_t (*decompress)(void*, void*, size_t, const void*, size_t) = nullptr;
  std::string problem;  // why it cannot be used; empty if it can
};

template <typename F>
void find(void* handle, const char* name, F& function, std::string& problem) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  if (!function && problem.empty()) problem = std::string("it has no ") + name;
}

Library open_library() {
  Library lib;
  void* handle = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);  // stays open as long as the process
  if (!handle) {
    const char* why = dlerror();
    lib.problem = why ? why : "it cannot be opened";
    return lib;
  }
  find(handle, "ZSTD_compressBound", lib.bound, lib.problem);
  find(handle, "ZSTD_isError", lib.is_error, lib.problem);
  find(handle, "ZSTD_getErrorName", lib.error_name, lib.problem);
  find(handle, "ZSTD_versionString", lib.version, lib.problem);
  find(handle, "ZSTD_createCCtx", lib.make_compressor, lib.problem);
  find(handle, "ZSTD_freeCCtx", lib.free_compressor, lib.problem);
  find(handle, "ZSTD_compressCCtx", lib.compress, lib.problem);
  find(handle, "ZSTD_createDCtx", lib.make_decompressor, lib.problem);
  find(handle, "ZSTD_freeDCtx", lib.free_decompressor, lib.problem);
  find(handle, "ZSTD_decompressDCtx", lib.decompress, lib.problem);
  return lib;
}

const Library& any_library() {
  static const Library lib = open_library();
  return lib;
}

const Library& library() {
  const Library& lib = any_library();
  if (!lib.problem.empty()) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "zstd needs libzstd.so.1, which cannot be used (" + lib.problem +
                           "): install it (Debian: libzstd1) or pack with zstd=false");
  }
  return lib;
}

using Context = std::unique_ptr<void, size_t (*)(void*)>;

void* context_of(Context& context, void* (*make)()) {
  if (!context) context.reset(make());
  if (!context)
    throw StoreFailure(StoreFailure::Kind::Memory, "zstd got no memory: free some, or pack with zstd=false");
  return context.get();
}

}  // namespace

bool zstd_available() { return any_library().problem.empty(); }

std::string zstd_version() { return library().version(); }

size_t zstd_bound(size_t size) { return library().bound(size); }

size_t zstd_compress(void* to, size_t capacity, const void* from, size_t size, int level) {
  const Library& lib = library();
  if (level < 1 || level > 19) {
    throw StoreFailure(StoreFailure::Kind::Config,
                       "zstd level " + std::to_string(level) + " is not possible: choose 1 to 19");
  }
  thread_local Context context(nullptr, lib.free_compressor);
  const size_t got = lib.compress(context_of(context, lib.make_compressor), to, capacity, from, size, level);
  if (lib.is_error(got)) {
    throw StoreFailure(StoreFailure::Kind::Config, "zstd cannot compress " + std::to_string(size) +
                                                       " bytes (" + lib.error_name(got) +
                                                       "): pack with zstd=false");
  }
  return got;
}

size_t zstd_decompress(void* to, size_t capacity, const void* from, size_t size) {
  const Library& lib = library();
  thread_local Context context(nullptr, lib.free_decompressor);
  const size_t got = lib.decompress(context_of(context, lib.make_decompressor), to, capacity, from, size);
  if (lib.is_error(got)) {
    throw StoreFailure(StoreFailure::Kind::Corrupt, "an expert's " + std::to_string(size) +
                                                        " compressed bytes are damaged (" +
                                                        lib.error_name(got) + "): pack the model again");
  }
  return got;
}

}  // namespace specgate
