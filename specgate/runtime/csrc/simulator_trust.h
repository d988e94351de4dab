// What a store that learns how far to trust its forecasts (trust.h) would make of those of a workload.
#pragma once

#include "simulator_input.h"
#include "trust.h"

namespace specgate::sim {

/// Writes the forecasts again, each p corrected by what happened before its point, in falling p at each horizon.
/// `before`: events of earlier workloads that `trust` has seen. Nothing is learned of what lies beyond the end of a
/// document.
void trusted(const Calls& calls, int64_t before, Trust& trust, int32_t* expert, float* p);

}  // namespace specgate::sim
