// The tables one process serves under one plan epoch.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "status.hpp"
#include "table_memory.hpp"

namespace sidepool {

class Program;
struct ProgramSpec;

enum class Pooling : uint8_t { sum = 0, mean = 1, max = 2, none = 3 };
// int8 and int4 are FBGEMM's fused rows: `dim` bytes, then scale and bias as fp32; or two values a byte, the lower four
// bits first, then scale and bias as fp16. A value is scale · q + bias.
enum class RowFormat : uint8_t { fp32 = 0, fp16 = 1, bf16 = 2, int8 = 3, int4 = 4 };
// What the values of a lookup's result are; numbers as in frames. fp16 and bf16 are rounded to nearest even, once.
enum class OutputFormat : uint8_t { fp32 = 0, fp16 = 1, bf16 = 2 };
enum class OutOfRange : uint8_t { error = 0, zero = 1, default_row = 2, hash = 3 };

Pooling parse_pooling(const std::string& name);  // Error(rejected) on an unknown name
RowFormat parse_row_format(const std::string& name);
OutOfRange parse_out_of_range(const std::string& name);

constexpr int32_t kMaxDim = 4096;               // as wire/plan.py
constexpr int64_t kMaxRows = int64_t(1) << 48;  // as wire/plan.py; with kMaxDim no byte count overflows 63 bits

constexpr size_t row_bytes(RowFormat format, int32_t dim) {
  switch (format) {
    case RowFormat::fp32:
      return size_t(dim) * 4;
    case RowFormat::fp16:
    case RowFormat::bf16:
      return size_t(dim) * 2;
    case RowFormat::int8:
      return size_t(dim) + 8;
    case RowFormat::int4:
      return (size_t(dim) + 1) / 2 + 4;
  }
  return 0;
}

constexpr size_t value_bytes(OutputFormat format) { return format == OutputFormat::fp32 ? 4 : 2; }

// A table, or a shard of one, as the kernels see it: ids are rows of the shard. `base` may be replaced once (promotion into huge pages) while lookups run:
// read it once per feature, with acquire.
struct Table {
  std::atomic<const std::byte*> base{nullptr};
  int64_t rows = 0;
  int32_t dim = 0;
  RowFormat format = RowFormat::fp32;
  OutOfRange policy = OutOfRange::error;
  int64_t default_row = 0;
  // How far ahead of its use a row's fetch starts; 0: by lookahead.hpp's constant. A matter of speed alone: may change
  // while lookups run.
  std::atomic<int32_t> rows_ahead{0};
  // Of a computed table: its rows are this program's weights, and its bags are run, see program.hpp.
  const Program* program = nullptr;
};

constexpr int64_t kNoPadding = -1;

struct Feature {
  int32_t table = -1;  // its first shard; -1: not held here
  int32_t shards = 1;  // that follow one another, held here or not
  Pooling pooling = Pooling::sum;
  bool weighted = false;
  int64_t padding_index = kNoPadding;  // the id that bags pass over, as torch's embedding_bag
};

class TableSet {
 public:
  TableSet(int64_t epoch, int32_t tables, int32_t features);
  ~TableSet();
  TableSet(const TableSet&) = delete;
  TableSet& operator=(const TableSet&) = delete;

  // Set-up calls throw Error: plan (an index, shape or row outside what is allowed), shard (a file that cannot be
  // opened or is too short), internal (out of memory).

  // Maps rows `[rows, dim]` at byte `offset` of a file, read-only. The file must not shrink while the set lives.
  void add_file(int32_t table, const std::string& path, int64_t offset, int64_t rows, int32_t dim, RowFormat format,
                OutOfRange policy, int64_t default_row);
  // Copies rows into anonymous memory with huge pages.
  void add_copy(int32_t table, const void* data, int64_t rows, int32_t dim, RowFormat format, OutOfRange policy,
                int64_t default_row);
  // A feature whose table lies in `shards` tables of this set, from `table` on; at least one of them must have been added by
  // seal(). padding_index: a row of the table, or its number of rows, an id that is nothing but padding; none where rows are
  // cut, since whoever sorts the ids leaves padding out.
  void add_feature(int32_t feature, int32_t table, Pooling pooling, bool weighted, int64_t padding_index = kNoPadding,
                   int32_t shards = 1);
  // Makes `table` a computed one; after it and every table that the program reads were added.
  void add_program(int32_t table, ProgramSpec spec);
  void seal();

  // Where copies of rows lie from now on: before add_copy and promote. Error(plan) on a node that cannot be.
  void set_memory(const MemoryPolicy& policy);
  // Maps the memory that promote will fill. Under hugetlb it takes the pages; Error(internal) with how many are needed and
  // how many there are, where they are too few.
  void reserve();
  // Copies mapped tables into memory of their own while lookups go on; returns bytes copied. Reserves first where that was
  // not done. One thread at a time, not while the set is being destroyed. at_least: stops soon after so many bytes, and goes
  // on there when called again; a table is read from its copy once all of it is there.
  int64_t promote(int64_t at_least = std::numeric_limits<int64_t>::max());
  // Has a mapped table read its rows where another set's promote put those of the same file: each set keeps them as long as it
  // lives. False where there is nothing to share: that table is not promoted, or this one has memory of its own. Error(plan)
  // for a table that is not held, or of another shape. Lookups may go on in both, the other may be promoted meanwhile.
  bool share(int32_t table, const TableSet& other, int32_t others_table);
  // Why rows do not lie on the nodes that set_memory named: the kernel's errno, 0 where they do. After reserve.
  int placement_error() const { return placement_error_; }

  // Sets every table's lookahead: `bytes` of rows, or what is measured to be fastest (bytes = 0; at most about 100 ms).
  // Tables that a cache holds are left at the constant.
  void choose_lookahead(int64_t bytes);

  int64_t epoch() const { return epoch_; }
  int64_t bytes() const;
  int64_t huge_bytes() const;
  int32_t table_count() const { return table_count_; }
  int32_t feature_count() const { return int32_t(features_.size()); }
  const Table& table(int32_t i) const { return tables_[i]; }
  const Feature& feature(int32_t i) const { return features_[i]; }
  // A shard of a feature's table; null where it is not held here.
  const Table* held(uint32_t feature, uint32_t shard) const {
    if (feature >= features_.size() || features_[feature].table < 0 || shard >= uint32_t(features_[feature].shards)) return nullptr;
    const Table& table = tables_[size_t(features_[feature].table) + shard];
    return table.base.load(std::memory_order_relaxed) != nullptr ? &table : nullptr;
  }
  bool sealed() const { return sealed_; }

 private:
  struct Region;  // one mapping: address, length, whether it is file-backed
  std::shared_ptr<Region> memory_of(int32_t table) const;
  Table& describe(int32_t index, int64_t rows, int32_t dim, RowFormat format, OutOfRange policy, int64_t default_row);
  std::byte* add_memory(int32_t index, size_t bytes);

  int64_t epoch_;
  int32_t table_count_;
  std::unique_ptr<Table[]> tables_;
  std::vector<Feature> features_;
  std::vector<std::unique_ptr<Program>> programs_;
  std::vector<std::shared_ptr<Region>> regions_;
  mutable std::mutex growing_;  // while regions_ grows, or a set that shares looks into it
  MemoryPolicy memory_;
  int placement_error_ = 0;
  std::atomic<int64_t> huge_bytes_{0};
  bool sealed_ = false;
};

// CRC-32C (Castagnoli), hardware where there is some. `seed` is the CRC so far.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

}  // namespace sidepool
