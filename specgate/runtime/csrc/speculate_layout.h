// Where everything lies and how the work of a launch is divided: index arithmetic that the kernel, its
// emulation on the CPU and the checks of sizes share.
//
// Letters: as in speculate.h. A chunk is a run of rows of a matrix: the inputs that one work item multiplies.
#pragma once

#include "speculate.h"

#ifdef __CUDACC__
#define SPECGATE_HD __host__ __device__ inline
#else
#define SPECGATE_HD inline
#endif

namespace specgate {

constexpr int kThreads = 256;  // of a thread block
constexpr int kTile = 4;       // sequences that share one read of a matrix
constexpr int kLargestChunk = 256;
constexpr int kUnits = 8;       // units of one work item,
constexpr int kUnitRows = 16;   // of so many sequences
constexpr int kTokens = 64;     // tokens of one work item of the attention
constexpr int kOwnRecords = 4;  // up to so many sequences every block makes the records for itself
constexpr int kCounters = 16;   // one for each grid barrier, and one at the end

SPECGATE_HD int pad8(int n) { return (n + 7) & ~7; }
SPECGATE_HD int smaller(int a, int b) { return a < b ? a : b; }
SPECGATE_HD int larger(int a, int b) { return a > b ? a : b; }
SPECGATE_HD int parts(int n, int of) { return (n + of - 1) / of; }

/// Horizons that exist from `layer`; those after are beyond the token (prefill) or the next one.
SPECGATE_HD int horizons_at(const SpeculationSizes& s, int layer) {
  return larger(0, smaller(s.horizons, (s.wraps ? 2 : 1) * s.layers - 1 - layer));
}

/// Horizons of which the target layers' routers speak.
SPECGATE_HD int within_at(const SpeculationSizes& s, int layer) {
  return layer < 0 || !s.routers ? 0 : smaller(s.horizons, s.layers - 1 - layer);
}

/// Target column of a horizon (0 is N+1): j < L is this token's layer j, else the next token's layer j - L.
SPECGATE_HD int column_at(const SpeculationSizes& s, int layer, int horizon) {
  return smaller(layer + 1 + horizon, 2 * s.layers - 1);
}

/// What a launch makes of a sequence's inputs: 1 / rms twice (of features, of routers), ln rms, whether it is
/// refused; the experts that were chosen, -1 for none; their weights. As floats.
enum Record { kUnitNorm, kRouterNorm, kLnRms, kRefused, kChosen };
SPECGATE_HD int record_size(const SpeculationSizes& s) { return kChosen + 2 * s.top_k; }

SPECGATE_HD int attention_width(const SpeculationSizes& s) { return s.heads * s.head_width; }

/// First places of the blocks of PointFeatures (specgate/predictors/features.py) in a feature vector.
struct FeatureLayout {
  int now, before, run, means, past, hidden, attention, size;
};

SPECGATE_HD FeatureLayout feature_layout(const SpeculationSizes& s) {
  FeatureLayout at{};
  at.now = 3 * s.token_dim;
  at.before = at.now + s.experts;
  at.run = at.before + s.experts;
  at.means = at.run + s.state_dim;
  at.past = at.means + 2 * s.state_dim;
  at.hidden = at.past + (1 + s.decays) * s.horizons * s.experts;
  at.attention = at.hidden + (s.hidden ? 3 * s.hidden + 1 : 0);
  at.size = at.attention + attention_width(s);
  return at;
}

/// Inputs of the first map that can differ from zero at `layer`, without the attention's.
SPECGATE_HD int first_inputs(const SpeculationSizes& s, int layer) {
  const FeatureLayout at = feature_layout(s);
  return layer < 0 ? at.hidden : at.attention;
}

/// Inputs of the attention's map, all of them and those that can differ from zero.
SPECGATE_HD int attend_size(const SpeculationSizes& s) {
  return s.token_dim + (s.hidden ? s.hidden : s.state_dim);
}
SPECGATE_HD int attend_inputs(const SpeculationSizes& s, int layer) {
  return s.hidden && layer < 0 ? s.token_dim : attend_size(s);
}

/// How one launch is divided. Depends on the layer and the number of sequences, never on the number of
/// blocks: sums have the same order on every device.
struct Plan {
  int chunk;                                       // rows of a work item
  int within, rows;                                // horizons of the routers, horizons in all
  int router_chunks, first_chunks, attend_chunks;  // of each matrix
  int product_items, attention_items, unit_items, row_items;
  int token_chunks, unit_chunks;
  bool spread;  // the records are made by all blocks together, a grid barrier follows
  int phases;
};

SPECGATE_HD Plan make_plan(const SpeculationSizes& s, int layer, int batch) {
  Plan plan{};
  plan.chunk = batch <= kTile ? 64 : batch <= 4 * kTile ? 128 : kLargestChunk;
  plan.within = within_at(s, layer);
  plan.rows = horizons_at(s, layer);
  plan.router_chunks = plan.within > 0 ? parts(s.hidden, plan.chunk) : 0;
  plan.first_chunks = s.width ? parts(first_inputs(s, layer), plan.chunk) : 0;
  plan.attend_chunks = s.heads ? parts(attend_inputs(s, layer), plan.chunk) : 0;
  plan.product_items = plan.within * plan.router_chunks + plan.first_chunks + plan.attend_chunks;
  plan.token_chunks = s.heads ? parts(s.context, kTokens) : 0;
  plan.attention_items = batch * s.heads * plan.token_chunks;
  plan.unit_chunks = parts(s.width, kUnits);
  plan.unit_items = plan.unit_chunks * parts(batch, kUnitRows);
  plan.row_items = batch * plan.rows;
  plan.spread = layer >= 0 && batch > kOwnRecords;
  plan.phases = (plan.product_items > 0) + (s.heads > 0) + (s.width ? s.depth : 0) + 1;
  return plan;
}

/// Offsets, in floats, of what a launch keeps between its phases.
struct Scratch {
  size_t records, router, first, attend, units[2], values, attention, p, size;
};

SPECGATE_HD size_t reserve(size_t& size, size_t floats) {
  const size_t at = size;
  size += (floats + 31) / 32 * 32;
  return at;
}

SPECGATE_HD Scratch make_scratch(const SpeculationSizes& s, const Plan& plan, int batch) {
  const size_t B = static_cast<size_t>(batch);
  const size_t wide = static_cast<size_t>(larger(pad8(s.width), pad8(s.horizons * s.experts)));
  Scratch at{};
  at.records = reserve(at.size, B * record_size(s));
  at.router = reserve(at.size, B * plan.within * plan.router_chunks * pad8(s.experts));
  at.first = reserve(at.size, B * plan.first_chunks * pad8(s.width));
  at.attend = reserve(at.size, B * plan.attend_chunks * pad8(3 * attention_width(s)));
  for (size_t& one : at.units) one = reserve(at.size, B * plan.unit_chunks * wide);
  at.values = reserve(at.size, B * s.width);
  at.attention = reserve(at.size, static_cast<size_t>(plan.attention_items) * (s.head_width + 2));
  at.p = reserve(at.size, B * s.horizons * s.experts);
  return at;
}

/// Floats of scratch that no launch of at most `s.batch` sequences exceeds.
inline size_t scratch_floats(const SpeculationSizes& s) {
  size_t most = 0;
  const int batches[] = {1, smaller(s.batch, kTile), smaller(s.batch, 4 * kTile),
                         s.batch};  // where chunks grow
  for (const int batch : batches)
    for (int layer = -1; layer < s.layers; ++layer) {
      const size_t size = make_scratch(s, make_plan(s, layer, batch), batch).size;
      most = most < size ? size : most;
    }
  return most;
}

/// Floats of a block's shared memory: the records, then what the phases work in.
SPECGATE_HD int shared_records(const SpeculationSizes& s) {
  return (kOwnRecords * record_size(s) + 3) / 4 * 4;
}
inline int shared_floats(const SpeculationSizes& s) {
  const int products = 2 * kTile * kLargestChunk + kLargestChunk + kLargestChunk / 32 + kTile * 8 * kThreads;
  const int attention = 2 * larger(kThreads, 3 * s.head_width) + 2 * kTokens + 64 + 16 * s.head_width;
  const int units = kUnitRows * (attention_width(s) + kUnits) + larger(kThreads, kUnitRows * kUnits) +
                    kUnits + kTile * 8 * kThreads;
  const int rows = 2 * s.experts + larger(kThreads, s.experts) + 64;
  const int merge = s.horizons * s.experts + parts(s.horizons * s.experts, 32) + 8;
  return shared_records(s) + larger(larger(products, attention), larger(units, larger(rows, merge)));
}

}  // namespace specgate
