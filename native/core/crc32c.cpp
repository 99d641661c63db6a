// CRC-32C (Castagnoli; RFC 3720, appendix B.4). Reflected: bit 31 of a register is the coefficient of x^0.
//
// The CRC instruction takes 8 bytes with a latency of 3 cycles, one a cycle: three independent streams keep it busy.
// Their registers are joined by shifting one past the bytes of the next, a multiplication by x^(8·bytes) (M. Adler).
#include "crc32c.hpp"

#include <array>
#include <cstring>

#include "tables.hpp"

namespace sidepool {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;

constexpr std::array<std::array<uint32_t, 256>, 8> make_byte_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][b] = crc;
  }
  for (size_t t = 1; t < 8; ++t) {
    for (size_t b = 0; b < 256; ++b) tables[t][b] = (tables[t - 1][b] >> 8) ^ tables[0][tables[t - 1][b] & 0xff];
  }
  return tables;
}

constexpr auto kByteTables = make_byte_tables();

uint64_t load64(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

}  // namespace

uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
  const auto& t = kByteTables;
  uint32_t crc = ~seed;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    const uint64_t w = load64(p) ^ crc;
    crc = t[7][w & 0xff] ^ t[6][(w >> 8) & 0xff] ^ t[5][(w >> 16) & 0xff] ^ t[4][(w >> 24) & 0xff] ^
          t[3][(w >> 32) & 0xff] ^ t[2][(w >> 40) & 0xff] ^ t[1][(w >> 48) & 0xff] ^ t[0][w >> 56];
  }
  for (; bytes > 0; --bytes, ++p) crc = (crc >> 8) ^ t[0][(crc ^ *p) & 0xff];
  return ~crc;
}

#if defined(__x86_64__)

namespace {

// Product of two polynomials modulo the CRC's, reflected.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
  }
  return product;
}

// Shifts a register past a fixed number of zero bytes, byte by byte of the register.
using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;

constexpr ShiftTable make_shift_table(size_t zero_bytes) {
  uint32_t power = 0x80000000;        // x^0
  uint32_t factor = 0x80000000 >> 8;  // x^8
  for (size_t n = zero_bytes; n != 0; n >>= 1) {
    if ((n & 1) != 0) power = multiply(power, factor);
    factor = multiply(factor, factor);
  }
  ShiftTable table{};
  for (size_t k = 0; k < 4; ++k) {
    for (uint32_t b = 1; b < 256; ++b) {
      const bool one_bit = (b & (b - 1)) == 0;
      table[k][b] = one_bit ? multiply(power, b << (8 * k)) : table[k][b & (b - 1)] ^ table[k][b & (~b + 1)];
    }
  }
  return table;
}

// Bytes per stream and round: long rounds amortise the joins, short ones serve what is left.
constexpr size_t kLong = 4096;
constexpr size_t kShort = 256;
constexpr ShiftTable kShiftLong = make_shift_table(kLong);
constexpr ShiftTable kShiftShort = make_shift_table(kShort);

uint64_t shift(const ShiftTable& t, uint64_t crc) {
  return t[0][crc & 0xff] ^ t[1][(crc >> 8) & 0xff] ^ t[2][(crc >> 16) & 0xff] ^ t[3][(crc >> 24) & 0xff];
}

template <size_t Stream>
__attribute__((target("sse4.2"))) uint64_t three_streams(uint64_t crc, const unsigned char*& p, size_t& bytes,
                                                         const ShiftTable& table) {
  while (bytes >= 3 * Stream) {
    uint64_t second = 0;
    uint64_t third = 0;
    for (const unsigned char* end = p + Stream; p < end; p += 8) {
      crc = __builtin_ia32_crc32di(crc, load64(p));
      second = __builtin_ia32_crc32di(second, load64(p + Stream));
      third = __builtin_ia32_crc32di(third, load64(p + 2 * Stream));
    }
    crc = shift(table, crc) ^ second;
    crc = shift(table, crc) ^ third;
    p += 2 * Stream;
    bytes -= 3 * Stream;
  }
  return crc;
}

}  // namespace

bool crc32c_hardware_runs_here() { return __builtin_cpu_supports("sse4.2"); }

__attribute__((target("sse4.2"))) uint32_t crc32c_hardware(const void* data, size_t bytes, uint32_t seed) {
  const auto* p = static_cast<const unsigned char*>(data);
  uint64_t crc = ~seed;
  crc = three_streams<kLong>(crc, p, bytes, kShiftLong);
  crc = three_streams<kShort>(crc, p, bytes, kShiftShort);
  for (; bytes >= 8; bytes -= 8, p += 8) crc = __builtin_ia32_crc32di(crc, load64(p));
  auto rest = uint32_t(crc);
  for (; bytes > 0; --bytes, ++p) rest = __builtin_ia32_crc32qi(rest, *p);
  return ~rest;
}

#else

bool crc32c_hardware_runs_here() { return false; }

uint32_t crc32c_hardware(const void* data, size_t bytes, uint32_t seed) { return crc32c_portable(data, bytes, seed); }

#endif

uint32_t crc32c(const void* data, size_t bytes, uint32_t seed) {
  static const bool hardware = crc32c_hardware_runs_here();
  return hardware ? crc32c_hardware(data, bytes, seed) : crc32c_portable(data, bytes, seed);
}

}  // namespace sidepool
