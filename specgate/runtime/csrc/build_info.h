// How this copy of the core was built, and what it finds on this machine.
#pragma once

#include <string>

namespace specgate {

struct BuildInfo {
  bool cuda;                 ///< compiled with the device code
  std::string cuda_version;  ///< of the CUDA runtime that is linked in, such as 13.0; empty without CUDA
  int devices;               ///< CUDA devices that can be used now: 0 with no driver, or without CUDA
  std::string compiler;      ///< name and version of the C++ compiler
};

/// Never throws for a missing driver or device.
BuildInfo build_info();

}  // namespace specgate
