// CRC-32C against published values and against the definition, one bit at a time.
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "crc32c.h"

namespace {

using specgate::crc32c;

uint32_t by_definition(const unsigned char* data, std::size_t size) {
  uint32_t crc = 0xFFFFFFFFu;
  for (std::size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0x82F63B78u & (0u - (crc & 1u)));
  }
  return ~crc;
}

}  // namespace

int main() {
  // RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms.
  std::vector<unsigned char> block(32, 0);
  CHECK(crc32c(block.data(), 32) == 0x8A9136AAu);
  block.assign(32, 0xFF);
  CHECK(crc32c(block.data(), 32) == 0x62A8AB43u);
  for (int i = 0; i < 32; ++i) block[i] = static_cast<unsigned char>(i);
  CHECK(crc32c(block.data(), 32) == 0x46DD794Eu);
  CHECK(crc32c("123456789", 9) == 0xE3069283u);
  CHECK(crc32c(nullptr, 0) == 0);

  std::mt19937 random(7);
  std::vector<unsigned char> bytes(70000);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  const std::size_t lengths[] = {0,    1,    7,    8,     9,     255,   767,   768,  769,
                                 1536, 4095, 4096, 12287, 12288, 12289, 25000, 69990};
  for (const std::size_t length : lengths) {
    for (std::size_t shift = 0; shift < 9; shift += 1 + shift / 3) {
      const uint32_t expected = by_definition(bytes.data() + shift, length);
      CHECK(crc32c(bytes.data() + shift, length) == expected);
      CHECK(specgate::crc32c_tables(bytes.data() + shift, length) == expected);
      const std::size_t first = length == 0 ? 0 : random() % length;
      const uint32_t head = crc32c(bytes.data() + shift, first);
      CHECK(crc32c(bytes.data() + shift + first, length - first, head) == expected);
      const uint32_t tail = by_definition(bytes.data() + shift + first, length - first);
      CHECK(specgate::crc32c_combine(head, tail, length - first) == expected);
    }
  }
  const std::string backend = specgate::crc32c_backend();
  CHECK(backend == "sse4.2" || backend == "tables");
  return specgate::test::report("crc32c");
}
