// The parts that bind.cpp puts into the module; each is defined in bind_<part>.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace specgate {

void bind_ledger(nanobind::module_& m);
void bind_file(nanobind::module_& m);
void bind_codec(nanobind::module_& m);
void bind_speculate(nanobind::module_& m);
void bind_trust(nanobind::module_& m);
void bind_simulator(nanobind::module_& m);
void bind_store(nanobind::module_& m);

}  // namespace specgate
