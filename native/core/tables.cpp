// Where rows lie: files mapped read-only, or copies in anonymous memory.
#include "tables.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "lookahead.hpp"
#include "memory.hpp"
#include "program.hpp"

namespace sidepool {
namespace {

// A table is copied in slices whose source is given back at once, so that its rows are never resident twice: small, since
// beside slices of 64 MiB threads that woke were up to 4 ms late.
constexpr size_t kCopySlice = size_t(256) << 10;

// Rows of smaller sets stay in a last-level cache, where fetching early gains little.
constexpr int64_t kMeasuredBytes = int64_t(64) << 20;

template <class Enum, size_t N>
Enum parse_name(const char* what, const std::string& name, const char* const (&names)[N]) {
  std::string allowed;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return Enum(i);
    allowed += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw Error(Status::rejected, std::string(what) + ": found '" + name + "'; allowed: " + allowed);
}

[[noreturn]] void fail_os(const std::string& what) {
  throw Error(Status::internal, what + ": " + std::strerror(errno));
}

size_t page_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

}  // namespace

Pooling parse_pooling(const std::string& name) {
  return parse_name<Pooling>("pooling", name, {"sum", "mean", "max", "none"});
}

RowFormat parse_row_format(const std::string& name) {
  return parse_name<RowFormat>("row_format", name, {"fp32", "fp16", "bf16", "int8", "int4"});
}

OutOfRange parse_out_of_range(const std::string& name) {
  return parse_name<OutOfRange>("out_of_range", name, {"error", "zero", "default_row", "hash"});
}

struct TableSet::Region {
  Region(void* mapped, size_t bytes, int32_t index, bool file)
      : address(static_cast<std::byte*>(mapped)), length(bytes), table(index), file_backed(file) {}
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() { munmap(address, length); }

  std::byte* const address;
  const size_t length;
  const int32_t table;  // in the set that mapped it
  const bool file_backed;
  std::byte* copy = nullptr;  // of a file: the memory that promote fills
  size_t copied = 0;          // of a file: bytes of its mapping that promote is done with
};

TableSet::TableSet(int64_t epoch, int32_t tables, int32_t features)
    : epoch_(epoch), table_count_(tables), tables_(new Table[size_t(tables)]), features_(size_t(features)) {}

TableSet::~TableSet() = default;

Table& TableSet::describe(int32_t index, int64_t rows, int32_t dim, RowFormat format, OutOfRange policy,
                          int64_t default_row) {
  const std::string where = "table " + std::to_string(index);
  const auto refuse = [&](const std::string& problem) { throw Error(Status::plan, where + ": " + problem); };
  if (sealed_) refuse("added after the set was sealed");
  if (index < 0 || index >= table_count_) refuse("index allowed: 0 to " + std::to_string(table_count_ - 1));
  Table& table = tables_[size_t(index)];
  if (table.base.load(std::memory_order_relaxed) != nullptr) refuse("added twice");
  if (dim < 1 || dim > kMaxDim) {
    refuse("dim: found " + std::to_string(dim) + "; allowed: 1 to " + std::to_string(kMaxDim));
  }
  if (rows < 1 || rows > kMaxRows) {
    refuse("rows: found " + std::to_string(rows) + "; allowed: 1 to " + std::to_string(kMaxRows));
  }
  if (default_row < 0 || default_row >= rows) {
    refuse("default_row: found " + std::to_string(default_row) + "; allowed: 0 to " + std::to_string(rows - 1));
  }
  table.rows = rows;
  table.dim = dim;
  table.format = format;
  table.policy = policy;
  table.default_row = default_row;
  return table;
}

void TableSet::add_file(int32_t index, const std::string& path, int64_t offset, int64_t rows, int32_t dim,
                        RowFormat format, OutOfRange policy, int64_t default_row) {
  Table& table = describe(index, rows, dim, format, policy, default_row);
  const size_t bytes = size_t(rows) * row_bytes(format, dim);
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info;
  if (!fd || fstat(fd.get(), &info) != 0) {
    throw Error(Status::shard, path + ": " + std::strerror(errno));
  }
  if (offset < 0 || offset > info.st_size || bytes > size_t(info.st_size - offset)) {
    throw Error(Status::shard, path + ": found " + std::to_string(info.st_size) + " bytes; allowed: at least " +
                                   std::to_string(bytes) + " from byte " + std::to_string(offset));
  }
  const size_t lead = size_t(offset) % page_bytes();
  regions_.reserve(regions_.size() + 1);
  void* mapped = mmap(nullptr, lead + bytes, PROT_READ, MAP_SHARED, fd.get(), off_t(size_t(offset) - lead));
  if (mapped == MAP_FAILED) fail_os("cannot map " + path);
  auto* address = static_cast<std::byte*>(mapped);
  regions_.push_back(std::make_shared<Region>(address, lead + bytes, index, true));
  table.base.store(address + lead, std::memory_order_release);
}

void TableSet::add_copy(int32_t index, const void* data, int64_t rows, int32_t dim, RowFormat format, OutOfRange policy,
                        int64_t default_row) {
  Table& table = describe(index, rows, dim, format, policy, default_row);
  const size_t bytes = size_t(rows) * row_bytes(format, dim);
  std::byte* copy = add_memory(index, bytes);
  std::memcpy(copy, data, bytes);
  huge_bytes_.fetch_add(int64_t(bytes), std::memory_order_relaxed);
  table.base.store(copy, std::memory_order_release);
}

std::byte* TableSet::add_memory(int32_t index, size_t bytes) {
  regions_.reserve(regions_.size() + 1);
  std::byte* memory = map_rows(bytes, memory_, placement_error_);
  regions_.push_back(std::make_shared<Region>(memory, bytes, index, false));
  return memory;
}

void TableSet::add_feature(int32_t index, int32_t table, Pooling pooling, bool weighted, int64_t padding_index, int32_t shards) {
  const std::string where = "feature " + std::to_string(index);
  if (sealed_) throw Error(Status::plan, where + ": added after the set was sealed");
  if (index < 0 || index >= feature_count()) {
    throw Error(Status::plan, where + ": index allowed: 0 to " + std::to_string(feature_count() - 1));
  }
  if (table < -1 || table >= table_count_) {
    throw Error(Status::plan, where + ": table: found " + std::to_string(table) + "; allowed: -1 (not held here) to " +
                                  std::to_string(table_count_ - 1));
  }
  if (shards < 1 || (table >= 0 && shards > table_count_ - table)) {
    throw Error(Status::plan, where + ": shards: found " + std::to_string(shards) + "; allowed: 1 to " +
                                  std::to_string(table_count_ - std::max(table, 0)));
  }
  if (weighted && pooling != Pooling::sum && pooling != Pooling::mean) {
    throw Error(Status::plan, where + ": weighted: found with pooling max or none; allowed with: sum, mean");
  }
  features_[size_t(index)] = {table, shards, pooling, weighted, padding_index};
}

void TableSet::add_program(int32_t index, ProgramSpec spec) {
  const std::string where = "table " + std::to_string(index);
  if (sealed_) throw Error(Status::plan, where + ": a program added after the set was sealed");
  if (index < 0 || index >= table_count_ || tables_[size_t(index)].base.load(std::memory_order_relaxed) == nullptr)
    throw Error(Status::plan, where + ": found a program without weights; allowed: a table that was added");
  programs_.push_back(std::make_unique<Program>(std::move(spec), *this, index));
  tables_[size_t(index)].program = programs_.back().get();
}

void TableSet::seal() {
  for (size_t i = 0; i < features_.size(); ++i) {
    const Feature& feature = features_[i];
    if (feature.table < 0) continue;
    const std::string where = "feature " + std::to_string(i);
    bool held = false;
    if (tables_[size_t(feature.table)].program != nullptr &&
        (feature.pooling != Pooling::sum || feature.weighted || feature.shards != 1)) {
      throw Error(Status::plan, where + ": found pooling or shards of a computed table; allowed: sum, without weights, whole");
    }
    for (int32_t t = feature.table; t < feature.table + feature.shards; ++t) {
      const Table& table = tables_[size_t(t)];
      if (table.base.load(std::memory_order_relaxed) == nullptr) continue;
      held = true;
      if (feature.padding_index < kNoPadding || feature.padding_index > table.rows) {
        throw Error(Status::plan, where + ": padding_index: found " + std::to_string(feature.padding_index) + "; allowed: 0 to " +
                                      std::to_string(table.rows) + ", or -1 for none");
      }
    }
    if (!held) throw Error(Status::plan, where + ": table " + std::to_string(feature.table) + " was not added");
  }
  for (const auto& program : programs_) {
    if (program->reads_computed()) throw Error(Status::plan, "program: found a lookup of a computed table; allowed: of tables with rows");
  }
  sealed_ = true;
}

void TableSet::set_memory(const MemoryPolicy& policy) {
  for (const int node : policy.nodes) {
    if (node < 0 || node >= kMaxNodes) {
      throw Error(Status::plan, "nodes: found " + std::to_string(node) + "; allowed: 0 to " + std::to_string(kMaxNodes - 1));
    }
  }
  memory_ = policy;
}

void TableSet::reserve() {
  const std::lock_guard<std::mutex> lock(growing_);
  const size_t mapped = regions_.size();
  const auto bytes_of = [this](const Region& file) {
    const Table& table = tables_[size_t(file.table)];
    return size_t(table.rows) * row_bytes(table.format, table.dim);
  };
  size_t pages = 0;
  for (const auto& region : regions_) {
    if (region->file_backed && region->copy == nullptr) pages += hugetlb_pages(bytes_of(*region));
  }
  if (memory_.huge_pages == HugePages::hugetlb && pages > 0 && int64_t(pages) > free_hugetlb_pages()) {
    throw Error(Status::internal, hugetlb_shortage(pages));
  }
  for (size_t i = 0; i < mapped; ++i) {
    Region& file = *regions_[i];
    if (file.file_backed && file.copy == nullptr) file.copy = add_memory(file.table, bytes_of(file));
  }
}

int64_t TableSet::promote(int64_t at_least) {
  reserve();
  int64_t copied = 0;
  for (const auto& region : regions_) {
    Region& file = *region;
    if (!file.file_backed) continue;
    Table& table = tables_[size_t(file.table)];
    const std::byte* base = table.base.load(std::memory_order_relaxed);
    if (base < file.address || base >= file.address + file.length) continue;  // promoted by an earlier call, or shared
    const size_t bytes = size_t(table.rows) * row_bytes(table.format, table.dim);
    std::byte* copy = file.copy;
    const size_t lead = size_t(base - file.address);
    while (file.copied < file.length) {
      if (copied >= at_least) return copied;
      const size_t at = file.copied, end = std::min(at + kCopySlice, file.length), begin = std::max(at, lead);
      std::memcpy(copy + (begin - lead), file.address + begin, end - begin);
      // Lookups still read through the old base: the mapping stays, only its pages go, and a read faults them back.
      madvise(file.address + at, end - at, MADV_DONTNEED);
      file.copied = end;
      copied += int64_t(end - begin);
    }
    huge_bytes_.fetch_add(int64_t(bytes), std::memory_order_relaxed);
    table.base.store(copy, std::memory_order_release);
    madvise(file.address, file.length, MADV_DONTNEED);  // what lookups faulted back meanwhile
  }
  return copied;
}

std::shared_ptr<TableSet::Region> TableSet::memory_of(int32_t index) const {
  const std::byte* base = tables_[size_t(index)].base.load(std::memory_order_acquire);
  const std::lock_guard<std::mutex> lock(growing_);
  for (const auto& region : regions_) {
    if (!region->file_backed && region->address == base) return region;
  }
  return nullptr;
}

bool TableSet::share(int32_t index, const TableSet& other, int32_t others_index) {
  if (index < 0 || index >= table_count_ || others_index < 0 || others_index >= other.table_count_) {
    throw Error(Status::plan, "share: found tables " + std::to_string(index) + " and " + std::to_string(others_index) +
                                  "; allowed: those of the two sets");
  }
  Table& table = tables_[size_t(index)];
  const Table& others = other.tables_[size_t(others_index)];
  if (table.rows != others.rows || table.dim != others.dim || table.format != others.format || table.rows == 0) {
    throw Error(Status::plan, "share: table " + std::to_string(index) +
                                  ": found another shape, or no rows; allowed: the same rows");
  }
  const auto mapped = [index](const auto& region) { return region->file_backed && region->table == index; };
  const auto file = std::find_if(regions_.begin(), regions_.end(), mapped);
  if (file == regions_.end() || (*file)->copy != nullptr) return false;
  const std::shared_ptr<Region> memory = other.memory_of(others_index);
  if (memory == nullptr) return false;
  Region& own = **file;
  own.copy = memory->address;
  {
    const std::lock_guard<std::mutex> lock(growing_);
    regions_.push_back(memory);
  }
  huge_bytes_.fetch_add(table.rows * int64_t(row_bytes(table.format, table.dim)), std::memory_order_relaxed);
  table.base.store(memory->address, std::memory_order_release);
  madvise(own.address, own.length, MADV_DONTNEED);
  return true;
}

void TableSet::choose_lookahead(int64_t bytes) {
  std::vector<RowKind> kinds;
  for (int32_t i = 0; i < table_count_; ++i) {
    Table& table = tables_[size_t(i)];
    if (table.base.load(std::memory_order_relaxed) == nullptr) continue;
    const auto same = [&table](const RowKind& kind) { return kind.format == table.format && kind.dim == table.dim; };
    if (std::none_of(kinds.begin(), kinds.end(), same)) kinds.push_back({table.format, table.dim, 0});
  }
  if (bytes == 0 && this->bytes() >= kMeasuredBytes) {
    measure_lookahead(kinds, kMeasureLookaheadNs);
  } else {
    for (RowKind& kind : kinds) {
      // Copies, and most files' tensors, begin a line.
      const int32_t lines = row_lines(nullptr, int64_t(row_bytes(kind.format, kind.dim)));
      kind.rows_ahead = rows_ahead(lines, bytes > 0 ? bytes : kLookaheadBytes);
    }
  }
  for (const RowKind& kind : kinds) {
    for (int32_t i = 0; i < table_count_; ++i) {
      Table& table = tables_[size_t(i)];
      if (table.format == kind.format && table.dim == kind.dim) {
        table.rows_ahead.store(kind.rows_ahead, std::memory_order_relaxed);
      }
    }
  }
}

int64_t TableSet::bytes() const {
  int64_t sum = 0;
  for (int32_t i = 0; i < table_count_; ++i) {
    const Table& table = tables_[size_t(i)];
    if (table.base.load(std::memory_order_relaxed) == nullptr) continue;
    sum += table.rows * int64_t(row_bytes(table.format, table.dim));
  }
  return sum;
}

int64_t TableSet::huge_bytes() const { return huge_bytes_.load(std::memory_order_relaxed); }

}  // namespace sidepool
