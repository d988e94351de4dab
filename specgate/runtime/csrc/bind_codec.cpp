// The codecs for Python: formats, decoding and zstd.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "bind.h"
#include "codec.h"
#include "error.h"
#include "numbers.h"
#include "zstd.h"

namespace nb = nanobind;

namespace specgate {

namespace {

using ReadBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WriteBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PieceTuple =
    std::tuple<uint64_t, uint64_t, std::string, std::string, bool, uint64_t, uint64_t, uint64_t>;

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

Codec codec_of(const std::string& name) {
  if (name == "none") return Codec::None;
  if (name == "int8") return Codec::Int8;
  if (name == "int4") return Codec::Int4;
  if (name == "fp8") return Codec::Fp8;
  refuse("codec=" + name + " is unknown: choose none, int8, int4 or fp8");
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::F32;
  if (name == "bfloat16") return DType::BF16;
  if (name == "float16") return DType::F16;
  refuse("dtype=" + name + " is not one that experts are kept in: choose float32, bfloat16 or float16");
}

BlockFormat make_format(const std::string& codec, uint32_t group, const std::vector<PieceTuple>& pieces,
                        uint64_t slot_bytes, uint64_t block_bytes) {
  BlockFormat format;
  format.codec = codec_of(codec);
  format.group = group;
  format.slot_bytes = slot_bytes;
  format.block_bytes = block_bytes;
  for (const auto& [rows, cols, dtype, stored, coded, slot_offset, block_offset, scale_offset] : pieces) {
    format.pieces.push_back(
        {rows, cols, dtype_of(dtype), dtype_of(stored), coded, slot_offset, block_offset, scale_offset});
  }
  validate(format);
  return format;
}

void decode(const BlockFormat& format, const ReadBytes& block, const WriteBytes& slot) {
  if (block.size() != format.block_bytes || slot.size() != format.slot_bytes) {
    refuse("a block of " + std::to_string(block.size()) + " bytes for a slot of " +
           std::to_string(slot.size()) + " bytes: give " + std::to_string(format.block_bytes) + " and " +
           std::to_string(format.slot_bytes));
  }
  if (reinterpret_cast<uintptr_t>(block.data()) % 4 != 0 ||
      reinterpret_cast<uintptr_t>(slot.data()) % 4 != 0) {
    refuse("block and slot must be aligned to 4 bytes: allocate them so");
  }
  const nb::gil_scoped_release unlocked;
  decode_block(format, reinterpret_cast<const std::byte*>(block.data()),
               reinterpret_cast<std::byte*>(slot.data()));
}

nb::bytes compress(const ReadBytes& data, int level) {
  std::unique_ptr<char[]> buffer;
  size_t got = 0;
  {
    const nb::gil_scoped_release unlocked;
    const size_t capacity = zstd_bound(data.size());
    buffer = std::make_unique_for_overwrite<char[]>(capacity);
    got = zstd_compress(buffer.get(), capacity, data.data(), data.size(), level);
  }
  return nb::bytes(buffer.get(), got);
}

void decompress(const ReadBytes& data, const WriteBytes& out) {
  const nb::gil_scoped_release unlocked;
  const size_t got = zstd_decompress(out.data(), out.size(), data.data(), data.size());
  if (got != out.size()) {
    throw StoreFailure(StoreFailure::Kind::Corrupt, "an expert decompresses to " + std::to_string(got) +
                                                        " bytes instead of " + std::to_string(out.size()) +
                                                        ": pack the model again");
  }
}

#ifdef SPECGATE_CUDA
void decode_cuda(const BlockFormat& format, const std::vector<uintptr_t>& blocks,
                 const std::vector<uintptr_t>& slots, uintptr_t stream) {
  if (blocks.size() != slots.size()) {
    refuse(std::to_string(blocks.size()) + " blocks for " + std::to_string(slots.size()) +
           " slots: give as many of one as of the other");
  }
  const nb::gil_scoped_release unlocked;
  decode_blocks_cuda(format, reinterpret_cast<const std::byte* const*>(blocks.data()),
                     reinterpret_cast<std::byte* const*>(slots.data()), blocks.size(),
                     reinterpret_cast<CUstream_st*>(stream));
}

void numbers_cuda(uintptr_t to, const std::vector<int64_t>& numbers, uintptr_t stream) {
  const nb::gil_scoped_release unlocked;
  write_numbers_cuda(reinterpret_cast<int64_t*>(to), numbers.data(), numbers.size(),
                     reinterpret_cast<CUstream_st*>(stream));
}
#endif

}  // namespace

void bind_codec(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<BlockFormat>(m, "BlockFormat",
                          "What specgate.runtime.layout.BlockLayout says, for the native core.")
      .def(
          "__init__",
          [](BlockFormat* self, const std::string& codec, uint32_t group,
             const std::vector<PieceTuple>& pieces, uint64_t slot_bytes, uint64_t block_bytes) {
            new (self) BlockFormat(make_format(codec, group, pieces, slot_bytes, block_bytes));
          },
          "codec"_a, "group"_a, "pieces"_a, "slot_bytes"_a, "block_bytes"_a,
          "pieces: (rows, cols, dtype, stored, coded, slot_offset, block_offset, scale_offset).")
      .def_ro("slot_bytes", &BlockFormat::slot_bytes)
      .def_ro("block_bytes", &BlockFormat::block_bytes)
      .def_prop_ro("is_plain", &is_plain, "Whether a block is a slot byte for byte.");
  m.def("decode_block", &decode, "format"_a, "block"_a.noconvert(), "slot"_a.noconvert(),
        "Decodes an encoded block into a slot, both uint8 arrays in host memory.");
  m.def("zstd_available", &zstd_available, "Whether libzstd.so.1 is there.");
  m.def("zstd_version", &zstd_version, "Version of libzstd.so.1.");
  m.def("zstd_compress", &compress, "data"_a.noconvert(), "level"_a = 3,
        "One zstd frame of a uint8 array, as bytes.");
  m.def("zstd_decompress", &decompress, "data"_a.noconvert(), "out"_a.noconvert(),
        "Decompresses one frame into a uint8 array that it fills exactly.");
#ifdef SPECGATE_CUDA
  m.def("decode_blocks_cuda", &decode_cuda, "format"_a, "blocks"_a, "slots"_a, "stream"_a = 0,
        "Decodes blocks into slots on the current device: addresses in device memory, and a CUDA stream.");
  m.def("write_numbers_cuda", &numbers_cuda, "to"_a, "numbers"_a, "stream"_a = 0,
        "Writes integers (int64) to an address of the current device's memory, on a CUDA stream.");
#endif
}

}  // namespace specgate
