#include "prepared.hpp"

#include <algorithm>

#include "clock.hpp"
#include "serve.hpp"

namespace sidepool {
namespace {

class LastSize final : public ResponseSink {
 public:
  void progress(uint32_t, size_t bytes) override { bytes_ = bytes; }
  size_t bytes_ = 0;
};

constexpr int64_t kLineBytes = 64;

// Calls `use` with one address in every cache line of a row. kRowBytes: its size where that is known at compile time, else
// 0. Unrolled then: one instruction that steps through a row teaches the hardware's stride prefetcher to run on past it.
template <int64_t kRowBytes, class Use>
inline void each_line(const std::byte* row, int64_t row_bytes, Use use) {
  const int64_t bytes = kRowBytes > 0 ? kRowBytes : row_bytes;
#pragma GCC unroll 8
  for (int64_t i = 0; i < bytes; i += kLineBytes) use(row + i);
  // A row that does not fill whole lines may end in a line that no step of 64 bytes from its start meets.
  if constexpr (kRowBytes % kLineBytes != 0 || kRowBytes == 0) use(row + bytes - 1);
}

using Row = const std::byte* const*;

// Reads rows up to `end`, fetching each `ahead` rows before, up to `last`.
template <int64_t kRowBytes>
uint64_t read_run(Row row, Row end, Row last, ptrdiff_t ahead, int64_t row_bytes) {
  uint64_t seen = 0;
  for (; row < end; ++row) {
    if (last - row > ahead) {
      each_line<kRowBytes>(row[ahead], row_bytes, [](const std::byte* line) { __builtin_prefetch(line); });
    }
    each_line<kRowBytes>(*row, row_bytes, [&seen](const std::byte* line) { seen ^= uint64_t(*line); });
  }
  return seen;
}

using ReadRun = uint64_t (*)(Row, Row, Row, ptrdiff_t, int64_t);

// The sizes of rows that are benchmarked: dims 32, 64 and 128, as fp32, fp16 and int8.
ReadRun read_run_of(const std::byte* row, int64_t row_bytes) {
  const bool whole_lines = reinterpret_cast<uintptr_t>(row) % kLineBytes == 0;
  switch (row_bytes) {
    case 40:
      return read_run<40>;
    case 64:
      return whole_lines ? read_run<64> : read_run<0>;
    case 72:
      return read_run<72>;
    case 128:
      return whole_lines ? read_run<128> : read_run<0>;
    case 136:
      return read_run<136>;
    case 256:
      return whole_lines ? read_run<256> : read_run<0>;
    case 512:
      return whole_lines ? read_run<512> : read_run<0>;
    default:
      return read_run<0>;
  }
}

}  // namespace

void PreparedFrames::add(std::string_view bytes) {
  Frame frame{Mapping::anonymous(align_up(std::max<size_t>(bytes.size(), 1))), bytes.size(), {}, {}};
  std::memcpy(frame.memory.data(), bytes.data(), bytes.size());
  ParsedRequest request;
  if (parse_request(frame.memory.data(), frame.bytes, request) != Status::ok)
    throw Error(Status::frame, "not a request frame");
  frame.rows.reserve(request.header.value_count);
  const int64_t* values = request.values;
  size_t payload = 0;
  for (const FeatureEntry& entry : request.entries) {
    const Table* held = tables_->held(entry.feature, entry.shard);
    if (held == nullptr) throw Error(Status::rejected, "feature " + std::to_string(entry.feature) + " is not held");
    const Table& table = *held;
    const Pooling pooling = tables_->feature(int32_t(entry.feature)).pooling;
    const int64_t row = int64_t(row_bytes(table.format, table.dim));
    const std::byte* base = table.base.load(std::memory_order_acquire);
    for (uint64_t i = 0; i < entry.value_count; ++i, ++values) {
      if (uint64_t(*values) >= uint64_t(table.rows))
        throw Error(Status::rejected, "id " + std::to_string(*values) + " is outside its table");
      frame.rows.push_back(base + *values * row);
    }
    frame.runs.push_back({base, size_t(entry.value_count), row});
    payload += block_bytes(entry, pooling, table.dim, request.header.batch, request.header.output_format);
  }
  if (payload > payload_.bytes()) payload_ = Mapping::anonymous(payload);
  frames_.push_back(std::move(frame));
}

Status PreparedFrames::serve(size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i) {
    const Frame& frame = frames_[i];
    if (parse_request(frame.memory.data(), frame.bytes, parsed_) != Status::ok) return Status::frame;
    LastSize sink;
    const ResponseHeader header =
        sidepool::serve(tables_.get(), {&parsed_, now_ns(), payload_.data(), payload_.bytes()}, sink, nullptr);
    if (header.status != 0) return Status(header.status);
    payload_bytes_ = sink.bytes_;
  }
  return Status::ok;
}

uint64_t PreparedFrames::read_rows(size_t first, size_t count, int64_t bytes_ahead) const {
  uint64_t seen = 0;
  for (size_t i = first; i < first + count; ++i) {
    const std::vector<const std::byte*>& rows = frames_[i].rows;
    Row row = rows.data();
    Row last = row + rows.size();
    for (const Run& run : frames_[i].runs) {
      const ptrdiff_t ahead = std::max<int64_t>(1, bytes_ahead / run.row_bytes);
      if (row == rows.data()) {
        for (Row p = row; p < row + std::min(ahead, last - row); ++p) {
          each_line<0>(*p, run.row_bytes, [](const std::byte* line) { __builtin_prefetch(line); });
        }
      }
      seen ^= read_run_of(run.base, run.row_bytes)(row, row + run.count, last, ahead, run.row_bytes);
      row += run.count;
    }
  }
  return seen;
}

}  // namespace sidepool
