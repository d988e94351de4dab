// Decoding on the device: one launch places all tensors of up to 64 experts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "codec.h"
#include "error.h"

namespace specgate::kernels {

__device__ inline float float_of_half_bits(uint16_t x) { return __half2float(__ushort_as_half(x)); }

__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// Values are read once, scales by many lanes.
__device__ inline uint4 load_once(const uint4* at) { return __ldcs(at); }
template <typename T>
__device__ inline T load_cached(const T* at) {
  return __ldg(at);
}

__device__ inline void sync_warp() { __syncwarp(); }

}  // namespace specgate::kernels

#include "codec_kernels.cuh"

namespace specgate {

namespace {

using kernels::Source;
using kernels::Work;

template <DType To>
void launch(Codec codec, const Work& work, uint32_t jobs, cudaStream_t stream) {
  const dim3 grid((work.tiles + kernels::kWarps - 1) / kernels::kWarps, jobs);
  const uint32_t threads = 32 * kernels::kWarps;
  if (codec == Codec::Int4) {
    kernels::decode_kernel<Source::Int4, To><<<grid, threads, 0, stream>>>(work);
  } else if (codec == Codec::Fp8) {
    kernels::decode_kernel<Source::Fp8, To><<<grid, threads, 0, stream>>>(work);
  } else {  // without a codec, the kernel's branch for coded pieces is not taken
    kernels::decode_kernel<Source::Int8, To><<<grid, threads, 0, stream>>>(work);
  }
}

void check_aligned(const void* memory, const char* what) {
  if (reinterpret_cast<uintptr_t>(memory) % 16 != 0) {
    throw StoreFailure(
        StoreFailure::Kind::Config,
        std::string("a ") + what + " on the device is not aligned to 16 bytes: allocate it so");
  }
}

}  // namespace

void decode_blocks_cuda(const BlockFormat& format, const std::byte* const* blocks, std::byte* const* slots,
                        size_t count, cudaStream_t stream) {
  for (const DType to : {DType::F32, DType::BF16, DType::F16}) {
    Work work = kernels::plan(format, to);
    if (work.pieces == 0) continue;
    for (size_t first = 0; first < count; first += kernels::kMaxJobs) {
      const auto jobs = static_cast<uint32_t>(std::min<size_t>(kernels::kMaxJobs, count - first));
      for (uint32_t j = 0; j < jobs; ++j) {
        check_aligned(blocks[first + j], "block");
        check_aligned(slots[first + j], "slot");
        work.job[j] = {reinterpret_cast<const unsigned char*>(blocks[first + j]),
                       reinterpret_cast<unsigned char*>(slots[first + j])};
      }
      if (to == DType::F32) {
        launch<DType::F32>(format.codec, work, jobs, stream);
      } else if (to == DType::BF16) {
        launch<DType::BF16>(format.codec, work, jobs, stream);
      } else {
        launch<DType::F16>(format.codec, work, jobs, stream);
      }
      const cudaError_t status = cudaGetLastError();
      if (status != cudaSuccess) {
        throw StoreFailure(StoreFailure::Kind::Io, std::string("decoding an expert on the device failed: ") +
                                                       cudaGetErrorString(status) +
                                                       "; see `specgate doctor`");
      }
    }
  }
}

void decode_block_cuda(const BlockFormat& format, const std::byte* block, std::byte* slot,
                       cudaStream_t stream) {
  decode_blocks_cuda(format, &block, &slot, 1, stream);
}

}  // namespace specgate
