#include "crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPECGATE_SSE42 1
#include <nmmintrin.h>
#endif

namespace specgate {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // bit 31 stands for x^0, bit 0 for x^31
constexpr uint32_t kOne = 1u << 31;

/// a * b modulo the polynomial.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b & 1) ? (b >> 1) ^ kPolynomial : b >> 1;
  }
  return product;
}

/// x^(2^k) for k = 0..66: enough for x^(8 n) with n of 64 bits.
constexpr std::array<uint32_t, 67> make_squares() {
  std::array<uint32_t, 67> squares{};
  squares[0] = kOne >> 1;
  for (std::size_t k = 1; k < squares.size(); ++k) squares[k] = multiply(squares[k - 1], squares[k - 1]);
  return squares;
}
constexpr auto kSquares = make_squares();

/// x^(8 bytes): multiplying a register by it is what `bytes` zero bytes do to it.
constexpr uint32_t zeros(uint64_t bytes) {
  uint32_t power = kOne;
  for (std::size_t k = 3; bytes != 0; ++k, bytes >>= 1) {
    if (bytes & 1) power = multiply(kSquares[k], power);
  }
  return power;
}

using Tables = std::array<std::array<uint32_t, 256>, 8>;

/// tables[j][v]: what byte v does to the register when j zero bytes follow it (slicing by 8).
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t crc = value;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ kPolynomial : crc >> 1;
    tables[0][value] = crc;
  }
  for (std::size_t j = 1; j < tables.size(); ++j) {
    for (std::size_t value = 0; value < 256; ++value) {
      const uint32_t before = tables[j - 1][value];
      tables[j][value] = (before >> 8) ^ tables[0][before & 255];
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();

/// The register after `size` bytes, by tables.
uint32_t advance_tables(uint32_t state, const unsigned char* data, std::size_t size) {
  if constexpr (std::endian::native == std::endian::little) {
    for (; size >= 8; data += 8, size -= 8) {
      uint64_t word;
      std::memcpy(&word, data, 8);
      word ^= state;
      state = kTables[7][word & 255] ^ kTables[6][(word >> 8) & 255] ^ kTables[5][(word >> 16) & 255] ^
              kTables[4][(word >> 24) & 255] ^ kTables[3][(word >> 32) & 255] ^
              kTables[2][(word >> 40) & 255] ^ kTables[1][(word >> 48) & 255] ^ kTables[0][word >> 56];
    }
  }
  for (; size != 0; ++data, --size) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#ifdef SPECGATE_SSE42

using Shift = std::array<std::array<uint32_t, 256>, 4>;

/// Multiplication by x^(8 bytes) as four look-ups.
constexpr Shift make_shift(uint64_t bytes) {
  const uint32_t power = zeros(bytes);
  std::array<uint32_t, 32> basis{};
  for (int bit = 0; bit < 32; ++bit) basis[bit] = multiply(power, 1u << bit);
  Shift shift{};
  for (int byte = 0; byte < 4; ++byte) {
    for (uint32_t value = 1; value < 256; ++value) {
      const int low = std::countr_zero(value);
      shift[byte][value] = shift[byte][value & (value - 1)] ^ basis[8 * byte + low];
    }
  }
  return shift;
}

constexpr std::size_t kLong = 4096, kShort = 256;
constexpr Shift kLongShift = make_shift(kLong), kShortShift = make_shift(kShort);

inline uint32_t apply(const Shift& shift, uint32_t state) {
  return shift[0][state & 255] ^ shift[1][(state >> 8) & 255] ^ shift[2][(state >> 16) & 255] ^
         shift[3][state >> 24];
}

/// The instruction has a latency of three cycles and a throughput of one: three independent lanes of `Lane`
/// bytes run side by side and are joined by shifts.
template <std::size_t Lane>
__attribute__((target("sse4.2"))) inline uint32_t three_lanes(const Shift& shift, uint32_t state,
                                                              const unsigned char*& data, std::size_t& size) {
  for (; size >= 3 * Lane; data += 3 * Lane, size -= 3 * Lane) {
    uint64_t a = state, b = 0, c = 0;
    for (std::size_t i = 0; i < Lane; i += 8) {
      uint64_t x, y, z;
      std::memcpy(&x, data + i, 8);
      std::memcpy(&y, data + Lane + i, 8);
      std::memcpy(&z, data + 2 * Lane + i, 8);
      a = _mm_crc32_u64(a, x);
      b = _mm_crc32_u64(b, y);
      c = _mm_crc32_u64(c, z);
    }
    state = apply(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    state = apply(shift, state) ^ static_cast<uint32_t>(c);
  }
  return state;
}

__attribute__((target("sse4.2"))) uint32_t advance_sse42(uint32_t state, const unsigned char* data,
                                                         std::size_t size) {
  state = three_lanes<kLong>(kLongShift, state, data, size);
  state = three_lanes<kShort>(kShortShift, state, data, size);
  uint64_t wide = state;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  state = static_cast<uint32_t>(wide);
  for (; size != 0; ++data, --size) state = _mm_crc32_u8(state, *data);
  return state;
}

bool has_sse42() {
  static const bool has = __builtin_cpu_supports("sse4.2") != 0;
  return has;
}

#else

bool has_sse42() { return false; }

#endif

}  // namespace

uint32_t crc32c_tables(const void* data, std::size_t size, uint32_t seed) {
  return ~advance_tables(~seed, static_cast<const unsigned char*>(data), size);
}

uint32_t crc32c(const void* data, std::size_t size, uint32_t seed) {
#ifdef SPECGATE_SSE42
  if (has_sse42()) return ~advance_sse42(~seed, static_cast<const unsigned char*>(data), size);
#endif
  return crc32c_tables(data, size, seed);
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  return multiply(zeros(length_b), crc_a) ^ crc_b;
}

const char* crc32c_backend() { return has_sse42() ? "sse4.2" : "tables"; }

}  // namespace specgate
