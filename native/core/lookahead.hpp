// How far ahead of its use the fetch of a row starts.
#pragma once
#include <cstdint>
#include <vector>

#include "tables.hpp"

namespace sidepool {

// Enough to cover the memory's latency, few enough to stay in a 32 KiB L1 cache until their use, as bytes of whole cache
// lines. Random ids over 26 tables of 200,000 rows, 128 bags of 20 ids, one thread of a Zen 5; rows of 4 lines, 24 / 32 / 48 /
// 64 / 96 ahead: 512, 474, 491, 501, 530 µs; rows of 2 lines, 48 / 64 / 96 / 128 / 192: 318, 271, 227, 212, 237 µs.
constexpr int64_t kLookaheadBytes = 12 << 10;

// Lines that a row touches at most and that are worth fetching.
int32_t row_lines(const std::byte* base, int64_t row_bytes);

// `bytes` of lookahead in rows of `row_lines` lines, within what is sensible: 4 to 128.
int32_t rows_ahead(int64_t row_lines, int64_t bytes = kLookaheadBytes);

// A way in which rows are stored, and the lookahead for it.
struct RowKind {
  RowFormat format;
  int32_t dim;
  int32_t rows_ahead;
};

// What a start may spend on measuring: nobody notices it beside the loading of tables that are worth measuring for.
constexpr uint64_t kMeasureLookaheadNs = 80'000'000;

// Sets `rows_ahead` of each kind to what pools random rows of scratch memory fastest here, or to the constant's where
// nothing is faster beyond noise. Takes at most about `budget_ns` and 64 MiB meanwhile; kinds for which there was no time,
// or no memory in time, keep the constant's. Any thread.
void measure_lookahead(std::vector<RowKind>& kinds, uint64_t budget_ns);

}  // namespace sidepool
