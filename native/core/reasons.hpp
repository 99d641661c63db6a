// Sentences for the reasons a part of a lookup is refused.
#pragma once
#include "status.hpp"

namespace sidepool {

// A template with {feature}, {bag} and {value}; rows and the like are filled in by who knows the plan.
inline const char* reason_text(Reason reason) {
  switch (reason) {
    case Reason::none: return "";
    case Reason::id_out_of_range: return "feature {feature}, bag {bag}: id {value} is outside its table; allowed: {allowed}";
    case Reason::negative_length: return "lengths: feature {feature}, bag {bag}: found {value}; allowed: 0 or more";
    case Reason::lengths_exceed_values: return "lengths: up to feature {feature} they add up to more than the {value} values given";
    case Reason::values_left_over: return "values: {value} of them are not covered by lengths; the lengths must add up to the number of values";
    case Reason::lengths_not_batches: return "lengths: found {value} entries; allowed: a multiple of the number of features ({allowed})";
    case Reason::weights_missing: return "weights: missing; a weighted feature needs one float32 weight per value";
    case Reason::weights_unexpected: return "weights: given, but no feature of this plan is weighted";
    case Reason::weights_count: return "weights: found {value}; allowed: exactly one per value";
    case Reason::weight_not_finite: return "weights: the weight at position {value} is NaN or infinite";
    case Reason::too_few_columns: return "ids: found {value} columns; allowed: at least {allowed}";
    case Reason::too_large: return "bag {bag}: needs {value} bytes, more than a slot of the lane holds";
    case Reason::program_failed: return "feature {feature}: its program failed in the sidecar, whose log says why";
    case Reason::record_length: return "feature {feature}, bag {bag}: found a record of {value} words; allowed: what its program reads";
    case Reason::unknown_feature: return "feature {value} is not held by the sidecar that was asked for it";
  }
  return "unknown reason";
}

}  // namespace sidepool
