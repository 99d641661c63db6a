// Pooling, once for every SIMD level: a level's file defines `Vector` (loads of every row format, stores of every
// output format, one lane-wise max and fma) and calls pool<Vector>. Everything here has internal linkage, see kernels.hpp.
//
// Ids, lengths and weights may lie in memory that a peer can write at any moment. Each use of a word reads it into a
// register, checks it there, and uses only the checked register.
#pragma once
#include <algorithm>
#include <numeric>

#include "kernels_values.hpp"

namespace sidepool::kernels {
namespace {

template <class T>
inline T read_once(const T* p) {
  T word;
  __atomic_load(p, &word, __ATOMIC_RELAXED);
  return word;
}

// Turns ids into row addresses, and moves the lookahead on by a row for every row taken.
class RowStream {
 public:
  RowStream(PoolTask& task, Lookahead& ahead)
      : task_(task),
        ahead_(ahead),
        values_(task.values),
        base_(task.base),
        rows_(uint64_t(task.rows)),
        padding_(task.padding_index),
        row_bytes_(task.row_bytes),
        window_(task.rows_ahead),
        in_flight_(ahead.in_flight) {
    enter();
    for (; in_flight_ < window_ && settle(); ++in_flight_) fetched_.fetch(next_++);
  }
  ~RowStream() {
    ahead_.next = next_;
    ahead_.in_flight = in_flight_;
  }
  RowStream(const RowStream&) = delete;
  RowStream& operator=(const RowStream&) = delete;

  // The row of id `i`, null where none stands for it.
  inline const std::byte* take(int64_t i) {
    // More are in flight than this feature wants where the one before had smaller rows.
    if (in_flight_ > window_ || !settle()) {
      --in_flight_;
    } else {
      fetched_.fetch(next_++);
    }
    const int64_t id = read_once(values_ + i);
    if (uint64_t(id) < rows_ && id != padding_) [[likely]]
      return base_ + id * row_bytes_;
    return stand_in_row(task_, id);
  }

  // The last `count` rows taken will be taken once more.
  inline void put_back(int64_t count) { in_flight_ += count; }

  // Calls use(i, row) for ids `i`, i + 1, … before `end`, all of whose rows have a size known to the compiler, and
  // returns where it stopped: at `end`, or before an id that needs `take`. No call in the loops: they would keep `use`
  // from holding its results in registers.
  template <int64_t kRowBytes, class Use>
  [[gnu::always_inline]] inline int64_t run(int64_t i, int64_t end, const Use& use) {
    while (i < end) {
      int64_t stop = end, stopped;
      if (in_flight_ > window_ || !settle()) {
        if (in_flight_ > window_) stop = std::min(end, i + in_flight_ - window_);
        stopped = run_over<kRowBytes>(i, stop, [](int64_t) {}, use);
        in_flight_ -= stopped - i;
      } else {
        stop = std::min(end, i + fetched_.value_count - next_);
        const Fetched from = fetched_;
        const int64_t shift = next_ - i;
        const auto fetch = [&from, shift](int64_t at) __attribute__((always_inline)) { from.fetch(at + shift); };
        const auto fetch_alike = [&from, shift](int64_t at) __attribute__((always_inline)) {
          from.fetch_alike<kRowBytes>(at + shift);
        };
        stopped = from.alike<kRowBytes>() ? run_over<kRowBytes>(i, stop, fetch_alike, use)
                                          : run_over<kRowBytes>(i, stop, fetch, use);
        next_ += stopped - i;
      }
      i = stopped;
      if (stopped < stop) break;
    }
    return i;
  }

 private:
  template <int64_t kRowBytes, class Fetch, class Use>
  [[gnu::always_inline]] inline int64_t run_over(int64_t i, int64_t stop, const Fetch& fetch, const Use& use) const {
    const int64_t* const values = values_;
    const std::byte* const base = base_;
    const uint64_t rows = rows_;
    const int64_t padding = padding_;
    for (; i < stop; ++i) {
      const int64_t id = read_once(values + i);
      if (uint64_t(id) >= rows || id == padding) [[unlikely]]
        break;
      fetch(i);
      use(i, base + id * kRowBytes);
    }
    return i;
  }

  // Moves the lookahead on to a feature with ids left; false at the end of the last one.
  inline bool settle() {
    while (next_ == fetched_.value_count) [[unlikely]] {
      if (ahead_.task == ahead_.end || ++ahead_.task == ahead_.end) return false;
      ahead_.next = 0;
      enter();
    }
    return true;
  }

  inline void enter() {
    next_ = ahead_.next;
    if (ahead_.task == ahead_.end) {
      next_ = 0;
      return;
    }
    const PoolTask& task = *ahead_.task;
    fetched_ = {task.values,    task.base != nullptr ? task.value_count : 0,
                task.base,      uint64_t(task.rows),
                task.row_bytes, task.row_lines};
  }

  // Whose rows are fetched ahead.
  struct Fetched {
    const int64_t* values = nullptr;
    int64_t value_count = 0;
    const std::byte* base = nullptr;
    uint64_t rows = 0;
    int64_t row_bytes = 0;
    int64_t lines = 0;

    // Only a hint: the id is read and checked again when its row is taken.
    [[gnu::always_inline]] inline void fetch(int64_t i) const {
      const int64_t id = read_once(values + i);
      if (uint64_t(id) < rows) [[likely]]
        prefetch_row(base + id * row_bytes, lines);
    }

    // What rows of this size touch at most where the first begins a line.
    static constexpr int64_t lines_of(int64_t bytes) {
      const int64_t step = std::gcd(bytes, kLineBytes);
      return (kLineBytes - step + bytes + kLineBytes - 1) / kLineBytes;
    }
    template <int64_t kRowBytes>
    inline bool alike() const {
      return row_bytes == kRowBytes && lines == lines_of(kRowBytes);
    }
    template <int64_t kRowBytes>
    [[gnu::always_inline]] inline void fetch_alike(int64_t i) const {
      const int64_t id = read_once(values + i);
      if (uint64_t(id) < rows) [[likely]]
        prefetch_row(base + id * kRowBytes, lines_of(kRowBytes));
    }
  };

  PoolTask& task_;
  Lookahead& ahead_;
  const int64_t* const values_;
  const std::byte* const base_;
  const uint64_t rows_;
  const int64_t padding_;
  const int64_t row_bytes_;
  const int64_t window_;
  int64_t in_flight_;
  int64_t next_;
  Fetched fetched_;
};

// Stores a row of `dim` columns: `whole` and `part` give the vector, or the n columns, from a column on.
template <class Vector, class Whole, class Part>
inline void store_row(Output output, std::byte* out, int64_t dim, Whole whole, Part part) {
  with_output<Vector>(output, [&](auto as) __attribute__((always_inline)) {
    int64_t c = 0;
    for (; c + Vector::width <= dim; c += Vector::width) as.store(out + c * as.bytes, whole(c));
    if (c < dim) as.store_part(out + c * as.bytes, part(c, dim - c), dim - c);
  });
}

template <class Vector>
inline void store_zeros(Output output, std::byte* out, int64_t dim) {
  const auto zero = Vector::broadcast(0.0f);
  store_row<Vector>(output, out, dim, [&](int64_t) { return zero; }, [&](int64_t, int64_t) { return zero; });
}

inline void refuse(PoolTask& task, Reason reason, int64_t bag, int64_t value) {
  task.reason = reason;
  task.bag = bag;
  task.value = value;
}

// The ids of one bag, walked once.
struct Bag {
  int64_t index;
  int64_t next;  // position of the next id among the values
  int64_t end;
};

// What to do at an id without a row: true to pass it over, false where stand_in_row refused it.
inline bool pass_over(PoolTask& task, const Bag& bag, int64_t& absent) {
  if (task.reason != Reason::none) {
    task.bag = bag.index;
    return false;
  }
  ++absent;
  return true;
}

// The next row of the bag, null at its end or, with task.reason set, at an id that is refused.
inline const std::byte* next_row(PoolTask& task, RowStream& rows, Bag& bag, int64_t& absent) {
  while (bag.next < bag.end) {
    const std::byte* row = rows.take(bag.next++);
    if (row != nullptr) [[likely]]
      return row;
    if (!pass_over(task, bag, absent)) return nullptr;
  }
  return nullptr;
}

// Pools bags of any dim: a group of rows at a time over blocks of columns, with the running result in memory.
template <class Vector, class Format, class Combine>
struct InBlocks {
  static constexpr bool kCopies = false;
  using Float = typename Vector::Float;
  static constexpr int64_t kGroup = 8;  // rows per pass over the result: its loads and stores cost 1/8 of the rows' loads
  static constexpr int kBlock = 4;      // vectors per block: four chains hide the latency of an addition

  struct Group {
    typename Format::Row rows[kGroup];
    float weights[kGroup];
    int64_t size;
    bool first;
  };

  static void pool(PoolTask& task, RowStream& rows, Bag& bag, std::byte* out, int64_t& absent) {
    // The running result is fp32: in `out` where that is, else here, and rounded once at the end.
    alignas(kLineBytes) std::byte wide[kMaxDim * sizeof(float)];
    std::byte* const sum = task.output == OutputFormat::fp32 ? out : wide;
    int64_t count = 0;
    for (;;) {
      Group group;
      group.size = 0;
      group.first = count == 0;
      while (group.size < kGroup) {
        const std::byte* row = next_row(task, rows, bag, absent);
        if (row == nullptr) break;
        group.rows[group.size] = Format::open(row, task.dim);
        if constexpr (Combine::weighted) group.weights[group.size] = read_once(task.weights + bag.next - 1);
        ++group.size;
      }
      if (task.reason != Reason::none) return;
      if (group.size == 0) break;
      add_group(group, sum, task.dim);
      count += group.size;
    }
    if (count == 0) return store_zeros<Vector>(Output(task), out, task.dim);
    if (task.pooling == Pooling::mean && count > 1) divide(sum, task.dim, float(count));
    if (sum == out) return;
    store_row<Vector>(
        Output(task), out, task.dim, [&](int64_t c) { return Vector::load(sum + c * 4); },
        [&](int64_t c, int64_t n) { return Vector::load_part(sum + c * 4, n); });
  }

  static void add_group(const Group& group, std::byte* out, int64_t dim) {
    int64_t c = 0;
    for (; c + kBlock * Vector::width <= dim; c += kBlock * Vector::width) add_block<kBlock>(group, out, c);
    for (; c + Vector::width <= dim; c += Vector::width) add_block<1>(group, out, c);
    if (c == dim) return;
    const int64_t n = dim - c;
    Float sum = group.first ? Combine::start() : Vector::load_part(out + c * 4, n);
    for (int64_t r = 0; r < group.size; ++r) {
      sum = Combine::next(sum, Format::load_part(group.rows[r], c, n), weight(group, r), group.first && r == 0);
    }
    Vector::store_part(out + c * 4, sum, n);
  }

  template <int N>
  static inline void add_block(const Group& group, std::byte* out, int64_t c) {
    Float sum[N];
    for (int v = 0; v < N; ++v) {
      const int64_t column = c + v * Vector::width;
      sum[v] = group.first ? Combine::start() : Vector::load(out + column * 4);
    }
    for (int64_t r = 0; r < group.size; ++r) {
      const bool first = group.first && r == 0;
      for (int v = 0; v < N; ++v) {
        sum[v] = Combine::next(sum[v], Format::load(group.rows[r], c + v * Vector::width), weight(group, r), first);
      }
    }
    for (int v = 0; v < N; ++v) Vector::store(out + (c + v * Vector::width) * 4, sum[v]);
  }

  static inline float weight(const Group& group, int64_t r) {
    if constexpr (Combine::weighted) return group.weights[r];
    return 1.0f;
  }

  static void divide(std::byte* out, int64_t dim, float count) {
    const Float divisor = Vector::broadcast(count);
    int64_t c = 0;
    for (; c + Vector::width <= dim; c += Vector::width) Vector::store(out + c * 4, Vector::load(out + c * 4) / divisor);
    if (c < dim) Vector::store_part(out + c * 4, Vector::load_part(out + c * 4, dim - c) / divisor, dim - c);
  }
};

// Pools bags whose accumulators, N whole vectors, stay in registers.
template <class Vector, class Format, class Combine, int N>
struct InRegisters {
  using Float = typename Vector::Float;
  static constexpr int64_t kDim = N * Vector::width;

  static constexpr int64_t kRowBytes = Format::row_bytes(kDim);
  static constexpr bool kCopies = !Combine::weighted;

  // Pools the bags of ids `i` to `end`, one each: returns where it stopped, see RowStream::run.
  static int64_t copy(const PoolTask& task, RowStream& rows, int64_t i, int64_t end, std::byte* out) {
    const int64_t stride = task.out_stride_bytes;
    const Output output(task);
    return rows.template run<kRowBytes>(
        i, end, [&out, stride, output](int64_t, const std::byte* row) __attribute__((always_inline)) {
          const auto opened = Format::open(row, kDim);
          with_output<Vector>(output, [&](auto as) __attribute__((always_inline)) {
            for (int v = 0; v < N; ++v) {
              as.store(out + v * Vector::width * as.bytes, Format::load(opened, v * Vector::width));
            }
          });
          out += stride;
        });
  }

  static inline void pool(PoolTask& task, RowStream& rows, Bag& bag, std::byte* out, int64_t& absent) {
    const int64_t begin = bag.next, end = bag.end;
    const float* const weights = task.weights;
    Float sum[N];
    for (int v = 0; v < N; ++v) sum[v] = Combine::start();
    const auto add = [&sum, weights, begin](int64_t i, const std::byte* row) __attribute__((always_inline)) {
      const auto opened = Format::open(row, kDim);
      float weight = 1.0f;
      if constexpr (Combine::weighted) weight = read_once(weights + i);
      for (int v = 0; v < N; ++v) {
        sum[v] = Combine::next(sum[v], Format::load(opened, v * Vector::width), weight,
                               !Combine::starts && i == begin);
      }
    };
    const int64_t stopped = rows.template run<kRowBytes>(begin, end, add);
    // Nothing may be called while sums live in registers, or they would not: a bag with an id that has no row begins anew.
    if (stopped < end || begin == end) [[unlikely]] {
      rows.put_back(stopped - begin);
      return InBlocks<Vector, Format, Combine>::pool(task, rows, bag, out, absent);
    }
    bag.next = end;
    if (task.pooling == Pooling::mean && end - begin > 1) {
      const Float divisor = Vector::broadcast(float(end - begin));
      for (int v = 0; v < N; ++v) sum[v] = sum[v] / divisor;
    }
    with_output<Vector>(Output(task), [&](auto as) __attribute__((always_inline)) {
      for (int v = 0; v < N; ++v) as.store(out + v * Vector::width * as.bytes, sum[v]);
    });
  }
};

// Pooling `none`: every id gives one row, at the id's own position in the output.
template <class Vector, class Format>
struct Unpooled {
  static constexpr bool kCopies = false;

  static void pool(PoolTask& task, RowStream& rows, Bag& bag, std::byte*, int64_t& absent) {
    while (bag.next < bag.end) {
      std::byte* out = task.out + bag.next * task.out_stride_bytes;
      Bag one{bag.index, bag.next, bag.next + 1};
      const std::byte* row = next_row(task, rows, one, absent);
      bag.next = one.next;
      if (task.reason != Reason::none) return;
      if (row == nullptr) {
        store_zeros<Vector>(Output(task), out, task.dim);
      } else {
        copy(task, Format::open(row, task.dim), out);
      }
    }
  }

  static inline void copy(const PoolTask& task, const typename Format::Row& row, std::byte* out) {
    store_row<Vector>(
        Output(task), out, task.dim, [&](int64_t c) { return Format::load(row, c); },
        [&](int64_t c, int64_t n) { return Format::load_part(row, c, n); });
  }
};

// Bags of one id in a row, from bag `b` on, whose ids lie among the values.
inline int64_t count_ones(const PoolTask& task, int64_t b, int64_t position) {
  const int64_t most = std::min(task.batch - b, task.value_count - position);
  if (task.lengths == nullptr) return task.fixed_length == 1 ? most : 0;
  int64_t n = 0;
  while (n < most && read_once(task.lengths + b + n) == 1) ++n;
  return n;
}

// Walks the bags: every length is read once and checked against the values that are left.
template <class Pooler>
void pool_bags(PoolTask& task, Lookahead& ahead) {
  RowStream rows(task, ahead);
  const int32_t* const lengths = task.lengths;
  int64_t position = 0;
  int64_t absent = 0;
  for (int64_t b = 0; b < task.batch && task.reason == Reason::none; ++b) {
    if constexpr (Pooler::kCopies) {
      if (const int64_t ones = count_ones(task, b, position); ones > 0) {
        const int64_t stopped =
            Pooler::copy(task, rows, position, position + ones, task.out + b * task.out_stride_bytes);
        b += stopped - position;
        position = stopped;
        if (b == task.batch) break;
      }
    }
    const int64_t length = lengths != nullptr ? read_once(lengths + b) : task.fixed_length;
    if (length < 0) [[unlikely]] {
      refuse(task, Reason::negative_length, b, length);
    } else if (length > task.value_count - position) [[unlikely]] {
      refuse(task, Reason::lengths_exceed_values, b, task.value_count);
    } else {
      Bag bag{b, position, position + length};
      Pooler::pool(task, rows, bag, task.out + b * task.out_stride_bytes, absent);
      position = bag.next;
    }
  }
  if (task.reason == Reason::none && position < task.value_count) {
    refuse(task, Reason::values_left_over, -1, task.value_count - position);
  }
  const int64_t refused = task.reason == Reason::id_out_of_range ? 1 : 0;
  task.rows_read = position - absent - refused;
}

template <class Vector, class Format, class Combine>
void pool_by_dim(PoolTask& task, Lookahead& ahead) {
  // The widths that trained models use. Eight accumulators fit every level's registers; 32 registers take sixteen.
  constexpr int64_t w = Vector::width;
  if (task.dim == w) return pool_bags<InRegisters<Vector, Format, Combine, 1>>(task, ahead);
  if (task.dim == 2 * w) return pool_bags<InRegisters<Vector, Format, Combine, 2>>(task, ahead);
  if (task.dim == 4 * w) return pool_bags<InRegisters<Vector, Format, Combine, 4>>(task, ahead);
  if (task.dim == 8 * w) return pool_bags<InRegisters<Vector, Format, Combine, 8>>(task, ahead);
  if constexpr (Vector::registers >= 32) {
    if (task.dim == 16 * w) return pool_bags<InRegisters<Vector, Format, Combine, 16>>(task, ahead);
  }
  pool_bags<InBlocks<Vector, Format, Combine>>(task, ahead);
}

template <class Vector, class Format>
void pool_by_mode(PoolTask& task, Lookahead& ahead) {
  switch (task.pooling) {
    case Pooling::sum:
    case Pooling::mean:
      if (task.weights != nullptr) return pool_by_dim<Vector, Format, WeightedSum<Vector>>(task, ahead);
      return pool_by_dim<Vector, Format, Sum<Vector>>(task, ahead);
    case Pooling::max:
      return pool_by_dim<Vector, Format, Max<Vector>>(task, ahead);
    case Pooling::none:
      return pool_bags<Unpooled<Vector, Format>>(task, ahead);
  }
}

template <class Vector>
void pool(PoolTask& task, Lookahead& ahead) {
  switch (task.format) {
    case RowFormat::fp32:
      return pool_by_mode<Vector, Fp32<Vector>>(task, ahead);
    case RowFormat::fp16:
      return pool_by_mode<Vector, Fp16<Vector>>(task, ahead);
    case RowFormat::bf16:
      return pool_by_mode<Vector, Bf16<Vector>>(task, ahead);
    case RowFormat::int8:
      return pool_by_mode<Vector, Int8<Vector>>(task, ahead);
    case RowFormat::int4:
      return pool_by_mode<Vector, Int4<Vector>>(task, ahead);
  }
}

}  // namespace
}  // namespace sidepool::kernels
