// The core links without Python, knows its compiler, and counts no device where there is no driver.
#include "build_info.h"
#include "check.h"

int main() {
  const specgate::BuildInfo info = specgate::build_info();
  CHECK(info.compiler.rfind("GCC ", 0) == 0 || info.compiler.rfind("Clang ", 0) == 0);
  CHECK(info.devices >= 0);
  CHECK(info.cuda == !info.cuda_version.empty());
  if (!info.cuda) CHECK(info.devices == 0);
  CHECK(specgate::build_info().devices == info.devices);
  return specgate::test::report("build_info");
}
