// device_cuda.cu over the emulated CUDA runtime.
#include "../../../specgate/runtime/csrc/device_cuda.cu"  // NOLINT

namespace specgate {

void decode_block_cuda(const BlockFormat& format, const std::byte* block, std::byte* slot, cudaStream_t stream) {
  emulated::of(stream).add([&format, block, slot] { decode_block(format, block, slot); });
}

}  // namespace specgate
