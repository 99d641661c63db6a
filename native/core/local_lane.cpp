// The lane without a wire: requests are answered in the posting thread.
#include "client_lane.hpp"

namespace sidepool {
namespace {

class NullSink final : public ResponseSink {
 public:
  void progress(uint32_t done, size_t) override { done_ = done; }
  uint32_t done_ = 0;
};

// Lookups run in the caller's thread, so slots only bound how many threads may look up at once; memory is reserved
// lazily, so generous slots cost nothing until used.
constexpr LaneLimits kLocalLimits{32, 16 << 20, 64 << 20};

class LocalLane final : public ClientLane {
 public:
  explicit LocalLane(std::shared_ptr<const TableSet> tables)
      : ClientLane(kLocalLimits),
        tables_(std::move(tables)),
        memory_(Mapping::anonymous(limits_.slots * (limits_.request_bytes + limits_.response_bytes))),
        controls_(std::make_unique<SlotControl[]>(limits_.slots)),
        parsed_(std::make_unique<ParsedRequest[]>(limits_.slots)) {}

  const char* kind() const override { return "local"; }
  std::byte* request(uint32_t slot) override { return memory_.data() + slot * limits_.request_bytes; }
  std::byte* response(uint32_t slot) override {
    return memory_.data() + limits_.slots * limits_.request_bytes + slot * limits_.response_bytes;
  }

 protected:
  SlotControl& control(uint32_t slot) override { return controls_[slot]; }

  Status send(uint32_t slot, size_t bytes, uint64_t) override {
    ParsedRequest& parsed = parsed_[slot];
    if (parse_request(request(slot), bytes, parsed) != Status::ok) return Status::frame;
    NullSink sink;
    const ServeInput input{&parsed, now_ns(), response(slot) + sizeof(ResponseHeader), payload_capacity()};
    ResponseHeader header = serve(tables_.get(), input, sink, nullptr);
    header.count = sink.done_;
    header.flags = kLastPiece;
    std::memcpy(response(slot), &header, sizeof header);
    mark_done(slot, sink.done_);
    return Status::ok;
  }

 private:
  std::shared_ptr<const TableSet> tables_;
  Mapping memory_;
  std::unique_ptr<SlotControl[]> controls_;
  std::unique_ptr<ParsedRequest[]> parsed_;
};

}  // namespace

std::shared_ptr<ClientLane> make_local_lane(std::shared_ptr<const TableSet> tables) {
  return std::make_shared<LocalLane>(std::move(tables));
}

}  // namespace sidepool
