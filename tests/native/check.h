// The whole test framework of the native tests: each file is one executable that returns the number of failures.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace specgate::test {

inline int failures = 0;

inline void check(bool good, const char* text, const char* file, int line) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, text);
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures ? "FAILED" : "ok");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace specgate::test

#define CHECK(condition) ::specgate::test::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define CHECK_THROWS(expression)                                     \
  do {                                                               \
    bool thrown = false;                                             \
    try {                                                            \
      (void)(expression);                                            \
    } catch (const std::exception&) {                                \
      thrown = true;                                                 \
    }                                                                \
    ::specgate::test::check(thrown, #expression " throws", __FILE__, __LINE__); \
  } while (false)
