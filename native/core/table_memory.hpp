// Memory for rows: which pages, on which NUMA nodes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sidepool {

// transparent: ordinary memory advised for huge pages. hugetlb: pages that the administrator has reserved. off: small pages.
enum class HugePages : uint8_t { transparent = 0, hugetlb = 1, off = 2 };

HugePages parse_huge_pages(const std::string& name);  // Error(rejected) on an unknown name

constexpr int kMaxNodes = 1024;  // as Linux: CONFIG_NODES_SHIFT is at most 10

struct MemoryPolicy {
  HugePages huge_pages = HugePages::transparent;
  // One: rows are put there as long as it has room. Several: page by page in turn. None: where the kernel puts them.
  std::vector<int> nodes;
};

// Reserved huge pages that rows of `bytes` take under `hugetlb`. The tail of a small table lies in small pages.
size_t hugetlb_pages(size_t bytes);
// Reserved huge pages of 2 MiB that nobody has; -1 where the kernel has none to offer.
int64_t free_hugetlb_pages();
// What to say where `wanted` pages are more than there are.
std::string hugetlb_shortage(size_t wanted);

// Anonymous memory at a 2 MiB boundary; `bytes` becomes the length to unmap. Throws Error(internal) where there is none.
// `placement_error` becomes the errno with which the kernel refused the placement on nodes, and stays where it did not.
std::byte* map_rows(size_t& bytes, const MemoryPolicy& policy, int& placement_error);

}  // namespace sidepool
