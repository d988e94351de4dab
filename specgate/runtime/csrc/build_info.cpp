#include "build_info.h"

#ifdef SPECGATE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace specgate {

BuildInfo build_info() {
  BuildInfo info{};
#if defined(__clang__)
  info.compiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info.compiler = "GCC " __VERSION__;
#else
  info.compiler = "unknown";
#endif
#ifdef SPECGATE_CUDA
  info.cuda = true;
  info.cuda_version = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  if (cudaGetDeviceCount(&info.devices) != cudaSuccess) {
    info.devices = 0;
    (void)cudaGetLastError();  // the next call must not be blamed for it
  }
#endif
  return info;
}

}  // namespace specgate
