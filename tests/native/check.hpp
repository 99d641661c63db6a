// A test's smallest needs: count what does not hold, say where, close with the plain line "N passed, N failed".
#pragma once
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

inline int& check_failures() {
  static int failures = 0;
  return failures;
}

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      if (++check_failures() <= 20) std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                                     \
  } while (0)

struct TestCase {
  std::string name;
  std::function<void()> body;
};

inline int run_tests(const std::vector<TestCase>& tests) {
  int passed = 0, failed = 0;
  for (const TestCase& test : tests) {
    const int before = check_failures();
    test.body();
    const bool good = check_failures() == before;
    (good ? passed : failed)++;
    std::printf("%s %s\n", good ? "ok" : "FAILED", test.name.c_str());
    std::fflush(stdout);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
