// Decoding against an oracle written another way; the conversions against every value; refusals; zstd.
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "codec.h"
#include "codec_oracle.h"
#include "codec_plan.h"
#include "error.h"
#include "floats.h"
#include "zstd.h"

using namespace specgate;
using specgate::test::expected_slot;
using specgate::test::make_format;
using specgate::test::random_block;

namespace {

const DType kTypes[] = {DType::F32, DType::BF16, DType::F16};

void test_conversions() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // every 16-bit number, to float32 and back
    const auto x = static_cast<uint16_t>(bits);
    if ((x & 0x7F80) != 0x7F80) {
      wrong += static_cast<double>(float_of_bf16(x)) != specgate::test::from_bits(x, DType::BF16);
      wrong += bf16_of_float(float_of_bf16(x)) != x;
    }
    if ((x & 0x7C00) != 0x7C00) {
      wrong += static_cast<double>(float_of_f16(x)) != specgate::test::from_bits(x, DType::F16);
      wrong += f16_of_float(float_of_f16(x)) != x;
    }
  }
  CHECK(wrong == 0);
  for (uint32_t x = 0; x < 256; ++x) {
    if ((x & 0x7F) != 0x7F)
      wrong += static_cast<double>(float_of_e4m3(static_cast<uint8_t>(x))) !=
               specgate::test::e4m3(static_cast<uint8_t>(x));
  }
  CHECK(wrong == 0);
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {  // any float32, and those near what float16 rounds
    float value = float_of_bits(static_cast<uint32_t>(random()));
    if (i % 2)
      value = std::ldexp(static_cast<float>(random() % 65536) / 32, static_cast<int>(random() % 48) - 36);
    if (!std::isfinite(value)) continue;
    if (std::fabs(value) < specgate::test::largest(DType::BF16)) {
      wrong += bf16_of_float(value) != specgate::test::nearest(value, DType::BF16);
    }
    if (std::fabs(value) < 65504) wrong += f16_of_float(value) != specgate::test::nearest(value, DType::F16);
  }
  CHECK(wrong == 0);
  const float infinity = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(bf16_of_float(infinity) == 0x7F80 && bf16_of_float(-infinity) == 0xFF80 &&
        bf16_of_float(nan) == 0x7FFF);
  CHECK(f16_of_float(infinity) == 0x7C00 && f16_of_float(-infinity) == 0xFC00 &&
        f16_of_float(-nan) == 0x7FFF);
  CHECK(f16_of_float(65519.9f) == 0x7BFF && f16_of_float(65520.0f) == 0x7C00 &&
        f16_of_float(-1e30f) == 0xFC00);
  CHECK(std::isinf(float_of_f16(0x7C00)) && std::isnan(float_of_f16(0x7C01)) &&
        std::signbit(float_of_f16(0x8000)));
}

void check_decoding(const BlockFormat& format, uint32_t seed) {
  validate(format);
  const std::vector<std::byte> block = random_block(format, seed);
  std::vector<std::byte> slot(format.slot_bytes, std::byte{0xA5});
  decode_block(format, block.data(), slot.data());
  CHECK(slot == expected_slot(format, block.data(), std::byte{0xA5}));
}

void test_decoding() {
  uint32_t seed = 0;
  for (const DType dtype : kTypes) {
    for (const uint64_t cols : {1, 3, 8, 31, 32, 33, 64, 65, 100, 128}) {
      const std::vector<std::pair<uint64_t, uint64_t>> shapes = {{5, cols}, {cols, 7}};
      check_decoding(make_format(Codec::Int8, 0, DType::F32, dtype, shapes, false), ++seed);
      check_decoding(make_format(Codec::Fp8, 0, DType::BF16, dtype, shapes, true), ++seed);
      check_decoding(make_format(Codec::Int4, 32, DType::F16, dtype, shapes, true), ++seed);
      check_decoding(make_format(Codec::Int4, 64, DType::F32, dtype, shapes, false), ++seed);
      for (const DType stored : kTypes) {
        check_decoding(make_format(Codec::None, 0, stored, dtype, shapes, true), ++seed);
      }
    }
  }
}

void test_plain() {
  const BlockFormat same = make_format(Codec::None, 0, DType::BF16, DType::BF16, {{3, 5}, {4, 4}}, true);
  CHECK(is_plain(same));
  CHECK(!is_plain(make_format(Codec::None, 0, DType::F32, DType::BF16, {{3, 5}}, false)));
  CHECK(!is_plain(make_format(Codec::Int8, 0, DType::BF16, DType::BF16, {{3, 5}}, false)));
  BlockFormat moved = same;
  std::swap(moved.pieces[0].slot_offset, moved.pieces[1].slot_offset);
  CHECK(!is_plain(moved));
}

template <typename Change>
std::string refusal(Change change) {
  BlockFormat format = make_format(Codec::Int4, 32, DType::F32, DType::BF16, {{4, 40}, {2, 64}}, false);
  change(format);
  try {
    validate(format);
  } catch (const StoreFailure& failure) {
    return failure.kind == StoreFailure::Kind::Config ? failure.what() : "wrong kind";
  }
  return "";
}

bool says(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void test_refusals() {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max() - 255;
  CHECK(refusal([](BlockFormat&) {}).empty());
  CHECK(says(refusal([](BlockFormat& f) { f.group = 48; }), "group=48"));
  CHECK(says(refusal([](BlockFormat& f) { f.codec = Codec::Int8; }), "group=32"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces.clear(); }), "without tensors"));
  CHECK(says(refusal([](BlockFormat& f) { f.slot_bytes += 8; }), "multiples of 256"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[0].rows = 0; }), "empty or too large"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[0].rows = f.pieces[0].cols = kHuge; }),
             "empty or too large"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[1].slot_offset += 1; }), "no multiple of 256"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[1].slot_offset = 0; }), "over another one"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[0].scale_offset = 0; }), "over another one"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[1].scale_offset += 256; }), "outside it"));
  CHECK(says(refusal([](BlockFormat& f) { f.pieces[1].slot_offset = kHuge; }), "beyond any slot"));
  CHECK(says(refusal([](BlockFormat& f) {
               f.codec = Codec::None;
               f.group = 0;
             }),
             "codec is none"));
}

void test_plan() {
  using kernels::Divisor;
  int wrong = 0;
  std::mt19937 random(2);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t d =
        i < 1000 ? static_cast<uint32_t>(i) + 1 : static_cast<uint32_t>(random()) >> (random() % 30 + 2) | 1u;
    const uint32_t n = static_cast<uint32_t>(random()) >> 1;
    const Divisor by = Divisor::by(d);
    wrong += by.divide(n) != n / d || by.divide(d - 1) != 0 || by.divide(d) != 1 || by.divide(0) != 0;
  }
  CHECK(wrong == 0);
  const BlockFormat many =
      make_format(Codec::Int8, 0, DType::F32, DType::F16,
                  {{1, 8}, {1, 8}, {1, 8}, {1, 8}, {1, 8}, {1, 8}, {1, 8}, {1, 8}, {1, 8}}, false);
  CHECK_THROWS(kernels::plan(many, DType::F16));
  CHECK(kernels::plan(many, DType::F32).pieces == 0);
  CHECK_THROWS(kernels::plan(make_format(Codec::Int8, 0, DType::F32, DType::F16, {{1 << 15, 1 << 15}}, false),
                             DType::F16));
}

void test_zstd() {
  std::vector<char> plain(100000);
  for (size_t i = 0; i < plain.size(); ++i) plain[i] = static_cast<char>(i % 97);
  if (!zstd_available()) {
    CHECK_THROWS(zstd_bound(1));
    return;
  }
  CHECK(!zstd_version().empty());
  std::vector<char> packed(zstd_bound(plain.size()));
  const size_t got = zstd_compress(packed.data(), packed.size(), plain.data(), plain.size(), 3);
  CHECK(got > 0 && got < plain.size() / 10);
  std::vector<char> back(plain.size());
  CHECK(zstd_decompress(back.data(), back.size(), packed.data(), got) == plain.size());
  CHECK(back == plain);
  CHECK_THROWS(zstd_decompress(back.data(), back.size() - 1, packed.data(), got));  // no room
  CHECK_THROWS(zstd_decompress(back.data(), back.size(), packed.data(), got - 1));  // cut off
  CHECK_THROWS(zstd_decompress(back.data(), back.size(), plain.data(), 100));       // no frame
  CHECK_THROWS(zstd_compress(packed.data(), 3, plain.data(), plain.size(), 3));
  CHECK_THROWS(zstd_compress(packed.data(), packed.size(), plain.data(), plain.size(), 0));
  CHECK_THROWS(zstd_compress(packed.data(), packed.size(), plain.data(), plain.size(), 20));
  try {
    zstd_decompress(back.data(), back.size(), plain.data(), 100);
  } catch (const StoreFailure& failure) {
    CHECK(failure.kind == StoreFailure::Kind::Corrupt);
  }
}

}  // namespace

int main() {
  test_conversions();
  test_decoding();
  test_plain();
  test_refusals();
  test_plan();
  test_zstd();
  return specgate::test::report("codec");
}
