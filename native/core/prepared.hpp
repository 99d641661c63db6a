// Request frames made ready once and answered over and over: what `sidepool bench pool` measures.
//
// `serve` is the path of an engine from the parsed frame to the pooled payload, with no lane around it. `read_rows` is
// its ceiling: it fetches every cache line of the same rows in the same order and computes nothing.
#pragma once
#include <memory>
#include <string_view>
#include <vector>

#include "frames.hpp"
#include "memory.hpp"
#include "tables.hpp"

namespace sidepool {

// One thread at a time. Keeps the tables; row addresses are resolved when frames are added, so promote before that.
class PreparedFrames {
 public:
  explicit PreparedFrames(std::shared_ptr<const TableSet> tables) : tables_(std::move(tables)) {}

  // Copies a frame. Error(frame) where it is not a request; Error(rejected) where it names a feature that is not held
  // or an id outside its table.
  void add(std::string_view frame);
  size_t size() const { return frames_.size(); }

  // Parses and answers frames `[first, first + count)` into one payload buffer, as an engine does; the first status
  // that is not ok ends it. No allocation after the first call.
  Status serve(size_t first, size_t count);
  // What the last call of `serve` pooled last.
  std::string_view payload() const { return {reinterpret_cast<const char*>(payload_.data()), payload_bytes_}; }

  // Reads the rows of frames `[first, first + count)`, starting to fetch each one `bytes_ahead` of rows before it is
  // read. The result is a reason for the compiler to keep the loads.
  uint64_t read_rows(size_t first, size_t count, int64_t bytes_ahead) const;

 private:
  struct Run {              // rows of one feature
    const std::byte* base;  // of the table
    size_t count;
    int64_t row_bytes;
  };
  struct Frame {
    Mapping memory;
    size_t bytes;
    std::vector<const std::byte*> rows;
    std::vector<Run> runs;
  };

  std::shared_ptr<const TableSet> tables_;
  std::vector<Frame> frames_;
  ParsedRequest parsed_;
  Mapping payload_;
  size_t payload_bytes_ = 0;
};

}  // namespace sidepool
