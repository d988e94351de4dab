#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "cuda_calls.h"
#include "numbers.h"

namespace specgate {

namespace {

template <size_t N>
struct Carried {
  int64_t numbers[N];
};

template <size_t N>
__global__ void write(int64_t* to, Carried<N> carried, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) to[i] = carried.numbers[i];
}

template <size_t N>
void launch(int64_t* to, const int64_t* numbers, size_t count, cudaStream_t stream) {
  Carried<N> carried;
  std::memcpy(carried.numbers, numbers, count * sizeof(int64_t));
  write<N><<<1, N < 128 ? 32 : 128, 0, stream>>>(to, carried, static_cast<int>(count));
}

}  // namespace

void write_numbers_cuda(int64_t* to, const int64_t* numbers, size_t count, CUstream_st* stream) {
  for (size_t done = 0; done < count; done += kNumbersPerLaunch) {
    const size_t now = std::min(kNumbersPerLaunch, count - done);
    if (now <= 32) {
      launch<32>(to + done, numbers + done, now, stream);
    } else {
      launch<kNumbersPerLaunch>(to + done, numbers + done, now, stream);
    }
  }
  require(cudaGetLastError(), "writing numbers to the device");
}

}  // namespace specgate
