// The Python module specgate.runtime._native. specgate/runtime/native.py is its one door.
#include "bind.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <exception>

#include "build_info.h"
#include "error.h"

#ifndef SPECGATE_VERSION
#define SPECGATE_VERSION "unknown"
#endif

namespace nb = nanobind;

namespace specgate {

namespace {

const char* class_of(StoreFailure::Kind kind) {
  switch (kind) {
    case StoreFailure::Kind::Budget:
      return "BudgetError";
    case StoreFailure::Kind::Config:
      return "ConfigError";
    default:
      return "StoreError";
  }
}

/// StoreFailure becomes a class of specgate.errors, which is imported when the first one is thrown.
void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const StoreFailure& failure) {
    nb::object errors = nb::steal(PyImport_ImportModule("specgate.errors"));
    if (!errors.is_valid()) return;  // Python's own ImportError stands
    nb::object type = nb::steal(PyObject_GetAttrString(errors.ptr(), class_of(failure.kind)));
    if (type.is_valid()) PyErr_SetString(type.ptr(), failure.what());
  }
}

nb::dict info() {
  const BuildInfo built = build_info();
  nb::dict d;
  d["version"] = SPECGATE_VERSION;
  d["compiler"] = built.compiler;
  d["cuda"] = built.cuda;
  d["cuda_version"] = built.cuda ? nb::object(nb::str(built.cuda_version.c_str())) : nb::object(nb::none());
  d["cuda_devices"] = built.devices;
  return d;
}

}  // namespace

}  // namespace specgate

NB_MODULE(_native, m) {
  m.doc() = "The native core of the expert store; use specgate.runtime.native to get it.";
  nb::register_exception_translator(specgate::translate);
  m.def("build_info", &specgate::info,
        "How the core was built and what it finds: version, compiler, cuda, cuda_version (None without), "
        "cuda_devices (0 with no driver).");
  specgate::bind_ledger(m);
  specgate::bind_file(m);
  specgate::bind_codec(m);
  specgate::bind_speculate(m);
  specgate::bind_trust(m);
  specgate::bind_simulator(m);
  specgate::bind_store(m);
}
