// Status numbers shared with Python (wire/errors.py) and with the frames. Never renumber.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sidepool {

enum class Status : int32_t {
  ok = 0,
  rejected = 1,
  overloaded = 2,
  deadline = 3,
  transport = 4,
  frame = 5,
  plan = 6,
  shard = 7,
  draining = 8,
  internal = 9,
};

// Why a part of a lookup was rejected. reason_text (reasons.cpp) has the sentences.
enum class Reason : int32_t {
  none = 0,
  id_out_of_range = 1,      // value: the id
  negative_length = 2,      // value: the length
  lengths_exceed_values = 3,  // value: number of values given
  values_left_over = 4,     // value: values not covered by any length
  lengths_not_batches = 5,  // value: number of lengths given
  weights_missing = 6,
  weights_unexpected = 7,
  weights_count = 8,        // value: number of weights given
  weight_not_finite = 9,    // value: position among the weights
  too_few_columns = 10,     // value: width of the id matrix
  too_large = 11,           // value: bytes one sample needs
  unknown_feature = 12,
  record_length = 13,       // value: words of a record
  program_failed = 14,      // with Status::internal: torch raised, the sidecar's log has it
};

// Thrown by set-up calls only; the request path returns Status.
struct Error : std::runtime_error {
  Status status;
  Error(Status s, const std::string& message) : std::runtime_error(message), status(s) {}
};

// What went wrong in one part, in the terms of the caller's input.
struct Fault {
  Status status = Status::ok;
  Reason reason = Reason::none;
  int32_t feature = -1;
  int64_t bag = -1;
  int64_t value = 0;
};

}  // namespace sidepool
