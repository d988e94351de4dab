// Small things that every use of the CUDA runtime needs: errors as exceptions, the current device, the card's memory.
#pragma once

#include <cuda_runtime.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cctype>
#include <cstdio>
#include <string>

#include "error.h"

namespace specgate {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // do not leave it for the next caller
  throw StoreFailure(StoreFailure::Kind::Memory,
                     std::string(what) + " failed: " + cudaGetErrorString(status) + "; see `specgate doctor`");
}

/// Makes the device current for the calling thread while it lives.
class Current {
 public:
  explicit Current(int ordinal) {
    cudaGetDevice(&before_);
    if (before_ != ordinal) cudaSetDevice(ordinal);
    ordinal_ = ordinal;
  }
  ~Current() {
    if (before_ != ordinal_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, ordinal_ = 0;
};

/// Prefers the NUMA node of the card for memory allocated while it lives (no libnuma; ignored where refused).
class NearCard {
 public:
  explicit NearCard(int ordinal) {
    char bus[32] = {0};
    if (cudaDeviceGetPCIBusId(bus, sizeof(bus), ordinal) != cudaSuccess) return;
    for (char* c = bus; *c; ++c) *c = static_cast<char>(std::tolower(*c));
    const std::string path = std::string("/sys/bus/pci/devices/") + bus + "/numa_node";
    FILE* file = std::fopen(path.c_str(), "r");
    int node = -1;
    if (file) {
      if (std::fscanf(file, "%d", &node) != 1) node = -1;
      std::fclose(file);
    }
    if (node < 0 || node >= 64) return;
    unsigned long mask = 1UL << node;
    set_ = syscall(SYS_set_mempolicy, 1 /* MPOL_PREFERRED */, &mask, 64UL) == 0;
  }
  ~NearCard() {
    if (set_) syscall(SYS_set_mempolicy, 0 /* MPOL_DEFAULT */, nullptr, 0UL);
  }

 private:
  bool set_ = false;
};

}  // namespace specgate
