#include "frames.hpp"

#include <cstdio>

namespace sidepool {

RequestLayout request_layout(size_t features, size_t length_count, size_t value_count, size_t weight_count) {
  RequestLayout layout;
  layout.entries = sizeof(RequestHeader);
  layout.lengths = align_up(layout.entries + features * sizeof(FeatureEntry));
  layout.values = align_up(layout.lengths + length_count * sizeof(int32_t));
  layout.weights = align_up(layout.values + value_count * sizeof(int64_t));
  layout.total = align_up(layout.weights + weight_count * sizeof(float));
  return layout;
}

Status check_request_header(const RequestHeader& header, uint64_t slot_bytes, uint32_t slots) {
  const bool valid = header.magic == kMagic && header.version == kWireVersion && header.kind == FrameKind::request &&
                     header.frame_bytes >= sizeof(RequestHeader) && header.frame_bytes <= slot_bytes &&
                     header.frame_bytes % kAlign == 0 && header.slot < slots && header.batch <= kMaxBatch &&
                     header.feature_count <= kMaxFeatures && header.output_format <= OutputFormat::bf16 &&
                     header.value_count <= header.frame_bytes / sizeof(int64_t);
  return valid ? Status::ok : Status::frame;
}

Status parse_request(const std::byte* frame, size_t bytes, ParsedRequest& out) {
  if (bytes < sizeof(RequestHeader)) return Status::frame;
  std::memcpy(&out.header, frame, sizeof(RequestHeader));
  const RequestHeader& header = out.header;
  if (check_request_header(header, bytes, kMaxSlots) != Status::ok) return Status::frame;
  const size_t features = header.feature_count;
  if (sizeof(RequestHeader) + features * sizeof(FeatureEntry) > header.frame_bytes) return Status::frame;
  out.entries.resize(features);
  if (features > 0) std::memcpy(out.entries.data(), frame + sizeof(RequestHeader), features * sizeof(FeatureEntry));

  uint64_t values = 0, lengths = 0, weights = 0;
  for (const FeatureEntry& entry : out.entries) {
    if (entry.value_count > header.value_count || entry.fixed_length < -1) return Status::frame;
    if (entry.bags > header.batch || (entry.flags & ~kEntryFlags) != 0) return Status::frame;
    const uint64_t bags = entry.bag_count(header.batch);
    if (entry.fixed_length >= 0 && uint64_t(entry.fixed_length) * bags != entry.value_count) return Status::frame;
    values += entry.value_count;  // at most 65,536 × 2^61 / 65,536: bounded by the check above and the sum below
    if (values > header.value_count) return Status::frame;
    if (entry.fixed_length < 0) lengths += bags;
    if (entry.flags & kWeightedEntry) weights += entry.value_count;
  }
  if (values != header.value_count) return Status::frame;
  const RequestLayout layout = request_layout(features, lengths, values, weights);
  if (layout.total != header.frame_bytes) return Status::frame;
  out.lengths = reinterpret_cast<const int32_t*>(frame + layout.lengths);
  out.values = reinterpret_cast<const int64_t*>(frame + layout.values);
  out.weights = reinterpret_cast<const float*>(frame + layout.weights);
  return Status::ok;
}

Status check_response_header(const ResponseHeader& header, uint32_t feature_count) {
  const bool valid = header.magic == kMagic && header.version == kWireVersion && header.kind == FrameKind::response &&
                     header.frame_bytes >= sizeof(ResponseHeader) && header.first <= feature_count &&
                     header.count <= feature_count - header.first && header.status >= 0 &&
                     header.status <= int32_t(Status::internal);
  return valid ? Status::ok : Status::frame;
}

uint64_t clock_id() {
  // The kernel's boot id: the monotonic clock starts anew with each boot.
  static const uint64_t id = [] {
    char text[64] = {};
    if (FILE* f = std::fopen("/proc/sys/kernel/random/boot_id", "r")) {
      if (std::fgets(text, sizeof text, f) == nullptr) text[0] = 0;
      std::fclose(f);
    }
    uint64_t hash = 1469598103934665603ull;  // FNV-1a
    for (const char* c = text; *c; ++c) hash = (hash ^ uint8_t(*c)) * 1099511628211ull;
    return hash;
  }();
  return id;
}

}  // namespace sidepool
