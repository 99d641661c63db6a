#include "table_memory.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "status.hpp"

namespace sidepool {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// From this size on a table's tail gets a whole huge page too: at most 1/16 more memory than rows. Below it the tail lies
// in small pages, or a thousand tables of 2.1 MB would take twice their bytes.
constexpr size_t kWholeHugePages = 16 * kHugePage;
// <linux/mman.h>: the page size is said, since the machine's default may be 1 GiB.
constexpr int kHugetlb2MiB = MAP_HUGETLB | (21 << 26);
// <linux/mempolicy.h>. Preferred rather than bound: a full node costs speed, not the process.
constexpr int kPreferred = 1, kInterleave = 3;
const char* const kPool = "/sys/kernel/mm/hugepages/hugepages-2048kB/";

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t mapped_bytes(size_t bytes) {
  return round_up(bytes, bytes >= kWholeHugePages ? kHugePage : size_t(sysconf(_SC_PAGESIZE)));
}

[[noreturn]] void fail_to_map(size_t bytes) {
  throw Error(Status::internal, "cannot map " + std::to_string(bytes) + " bytes of memory: " + std::strerror(errno));
}

int64_t read_pool(const char* name) {
  int64_t pages = -1;
  if (FILE* file = std::fopen((std::string(kPool) + name).c_str(), "re")) {
    long long found = 0;
    if (std::fscanf(file, "%lld", &found) == 1) pages = found;
    std::fclose(file);
  }
  return pages;
}

// Address space only; nothing is backed yet.
std::byte* reserve(size_t bytes) {
  const size_t reserved = bytes + kHugePage;
  void* mapped = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) fail_to_map(reserved);
  auto* start = static_cast<std::byte*>(mapped);
  const size_t before = round_up(uintptr_t(start), kHugePage) - uintptr_t(start);
  const size_t after = reserved - before - bytes;
  if (before > 0) munmap(start, before);
  if (after > 0) munmap(start + before + bytes, after);
  return start + before;
}

// Takes pages out of the reserved pool at once: nothing can fail once rows are written.
void take_hugetlb(std::byte* start, size_t bytes, size_t head) {
  if (head == 0) return;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | kHugetlb2MiB;
  if (mmap(start, head, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED) return;
  // A failed MAP_FIXED may have unmapped what was there; unmapping nothing is no error.
  munmap(start, bytes);
  throw Error(Status::internal, hugetlb_shortage(head / kHugePage));
}

}  // namespace

HugePages parse_huge_pages(const std::string& name) {
  const char* const names[] = {"transparent", "hugetlb", "off"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) return HugePages(i);
  }
  throw Error(Status::rejected, "huge_pages: found '" + name + "'; allowed: transparent, hugetlb, off");
}

size_t hugetlb_pages(size_t bytes) { return mapped_bytes(bytes) / kHugePage; }

int64_t free_hugetlb_pages() {
  const int64_t free = read_pool("free_hugepages"), promised = read_pool("resv_hugepages");
  return free < 0 || promised < 0 ? -1 : free - promised;
}

std::string hugetlb_shortage(size_t wanted) {
  const int64_t free = free_hugetlb_pages();
  if (free < 0) return "hugetlb: this kernel has no huge pages of 2 MiB";
  const int64_t missing = std::max<int64_t>(1, int64_t(wanted) - free);
  return "hugetlb: needed " + std::to_string(wanted * kHugePage) + " bytes (" + std::to_string(wanted) +
         " huge pages of 2 MiB), available " + std::to_string(size_t(free) * kHugePage) + " bytes (" +
         std::to_string(free) + "); as root: sysctl vm.nr_hugepages=" +
         std::to_string(std::max<int64_t>(0, read_pool("nr_hugepages")) + missing);
}

std::byte* map_rows(size_t& bytes, const MemoryPolicy& policy, int& placement_error) {
  const size_t pages = hugetlb_pages(bytes);
  bytes = mapped_bytes(bytes);
  std::byte* start = reserve(bytes);
  if (policy.huge_pages == HugePages::hugetlb) {
    take_hugetlb(start, bytes, pages * kHugePage);
  } else {
    // A kernel without transparent huge pages refuses the advice; small pages are slower, not wrong.
    madvise(start, bytes, policy.huge_pages == HugePages::off ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
  }
  if (!policy.nodes.empty()) {
    unsigned long mask[kMaxNodes / (8 * sizeof(unsigned long))] = {};
    constexpr int kBits = 8 * sizeof(unsigned long);
    for (const int node : policy.nodes) mask[node / kBits] |= 1ul << (node % kBits);
    const int mode = policy.nodes.size() > 1 ? kInterleave : kPreferred;
    // The kernel takes the number of bits plus one.
    if (syscall(SYS_mbind, start, bytes, mode, mask, kMaxNodes + 1, 0) != 0) placement_error = errno;
  }
  return start;
}

}  // namespace sidepool
