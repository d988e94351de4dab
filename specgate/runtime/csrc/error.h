// Failures that a user can cause or meet, each one sentence that names the value and the remedy.
#pragma once

#include <stdexcept>
#include <string>

namespace specgate {

/// Thrown by the store; the Python side turns the kind into a class of exception.
struct StoreFailure : std::runtime_error {
  enum class Kind { Budget, Io, Corrupt, Memory, Closed, Config };

  StoreFailure(Kind kind_, const std::string& what) : std::runtime_error(what), kind(kind_) {}

  Kind kind;
};

}  // namespace specgate
