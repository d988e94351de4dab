// What is known at one source point, value by value: the inputs of the maps, and what the state becomes.
//
// Letters: as in speculate.h. Written once for the device and for its emulation on the CPU: a `Block` says
// how to read what other blocks wrote.
#pragma once

#include <cmath>
#include <cstring>

#include "speculate_layout.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SPECGATE_FN __device__ __forceinline__
#define SPECGATE_PRAGMA(text) _Pragma(#text)
#define SPECGATE_UNROLL(times) SPECGATE_PRAGMA(unroll times)
#define SPECGATE_UNROLL_ALL SPECGATE_PRAGMA(unroll)
#else
#include "floats.h"
#define SPECGATE_FN inline
#define SPECGATE_UNROLL(times)
#define SPECGATE_UNROLL_ALL
#endif

namespace specgate::speculation {

struct BFloat16 {
  uint16_t bits;
};

/// Everything that a launch hands to its blocks.
struct SpeculationArgs {
  SpeculationModel model;
  SpeculationInput input;
  Plan plan;
  Scratch at;
  float* scratch;
  uint32_t* counters;  // [kCounters], zero before and after every launch
  uint64_t* sequence;  // of the last forecast
  RingView ring;
};

#ifdef __CUDACC__
SPECGATE_FN float float_of(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SPECGATE_FN float half_at(const void* values, size_t i) {
  return __half2float(static_cast<const __half*>(values)[i]);
}
SPECGATE_FN bool finite(float x) { return isfinite(x); }
#else
SPECGATE_FN float float_of(BFloat16 x) { return float_of_bf16(x.bits); }
SPECGATE_FN float half_at(const void* values, size_t i) {
  return float_of_f16(static_cast<const uint16_t*>(values)[i]);
}
SPECGATE_FN bool finite(float x) { return std::isfinite(x); }
#endif
SPECGATE_FN float float_of(float x) { return x; }

SPECGATE_FN float scalar_at(const void* values, Scalar type, size_t i) {
  if (type == Scalar::F32) return static_cast<const float*>(values)[i];
  if (type == Scalar::BF16) return float_of(static_cast<const BFloat16*>(values)[i]);
  return half_at(values, i);
}

/// An index, -1 if it is not below `end`.
SPECGATE_FN int index_at(const void* values, int bytes, size_t i, int end) {
  const int64_t x =
      bytes == 8 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
  return x >= 0 && x < end ? static_cast<int>(x) : -1;
}

SPECGATE_FN float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
SPECGATE_FN float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

template <class Block>
struct Inputs {
  const SpeculationArgs& a;
  const Block& block;
  const SpeculationSizes& s;
  const SpeculationState& state;
  const FeatureLayout at;
  const int layer, point;
  const float scale;  // of router weights among the features

  SPECGATE_FN Inputs(const SpeculationArgs& args, const Block& on)
      : a(args),
        block(on),
        s(args.model.sizes),
        state(args.model.state),
        at(feature_layout(args.model.sizes)),
        layer(args.input.layer),
        point(args.input.layer + 1),
        scale(sqrtf(static_cast<float>(s.experts))) {}

  // ---- this launch's inputs

  SPECGATE_FN float record(int b, int which) const {
    const int i = b * record_size(s) + which;
    return a.plan.spread ? block.load(a.scratch + a.at.records + i) : block.shared[i];
  }
  /// The hidden state could not be used: the row is left out.
  SPECGATE_FN bool refused(int b) const { return s.hidden > 0 && layer >= 0 && record(b, kRefused) != 0.0f; }
  SPECGATE_FN float hidden(int b, int d) const {
    if (layer < 0 || refused(b)) return 0.0f;
    return scalar_at(a.input.hidden, a.input.hidden_type, static_cast<size_t>(b) * s.hidden + d);
  }
  SPECGATE_FN float unit(int b, int d) const {
    return layer < 0 ? 0.0f : hidden(b, d) * record(b, kUnitNorm);
  }
  /// Experts that the layer's router chose: none before the first layer.
  SPECGATE_FN int choices() const { return layer < 0 ? 0 : s.top_k; }
  SPECGATE_FN int chosen(int b, int k) const { return static_cast<int>(record(b, kChosen + k)); }
  SPECGATE_FN float weight(int b, int k) const { return record(b, kChosen + s.top_k + k); }
  /// Id of the token `back` before the current one, -1 for none.
  SPECGATE_FN int id(int b, int back) const {
    if (layer >= 0) return state.ids[b * 3 + back];
    if (back > 0) return state.ids[b * 3 + back - 1];
    return index_at(a.input.ids, a.input.ids_bytes, b, s.vocab);
  }
  SPECGATE_FN int tokens(int b) const { return state.count[b] + (layer < 0 ? 1 : 0); }

  // ---- what the current and the previous token did at a layer

  SPECGATE_FN size_t slot(int b, int of_layer) const {
    return (static_cast<size_t>(b) * s.layers + of_layer) * s.top_k;
  }
  /// Router weight of an expert at a layer, of the token that passed it last; this one at `layer`.
  SPECGATE_FN float routed(int b, int of_layer, int e) const {
    float found = 0.0f;
    if (of_layer == layer) {
      SPECGATE_UNROLL(1)
      for (int k = 0; k < s.top_k; ++k)
        if (chosen(b, k) == e) found += weight(b, k);
      return found;
    }
    const size_t first = slot(b, of_layer);
    SPECGATE_UNROLL(4)
    for (int k = 0; k < s.top_k; ++k)
      if (state.experts[first + k] == e) found += state.weights[first + k];
    return found;
  }
  SPECGATE_FN float use(int b, int of_layer, int c, int e) const {
    const float old =
        state.use[((static_cast<size_t>(b) * s.layers + of_layer) * s.decays + c) * s.experts + e];
    if (of_layer != layer) return old;
    const float decay = a.model.weights.decay[c];
    float now = 0.0f;
    SPECGATE_UNROLL(1)
    for (int k = 0; k < s.top_k; ++k) now = chosen(b, k) == e ? 1.0f : now;
    return decay * old + (1.0f - decay) * now;
  }

  // ---- token embeddings and the running state

  SPECGATE_FN float token(int b, int back, int j) const {
    const int of = id(b, back);
    return of < 0 ? 0.0f : a.model.weights.token[static_cast<size_t>(of) * s.token_dim + j];
  }
  SPECGATE_FN float run(int b, int f) const {
    if (layer < 0) {
      const int of = id(b, 0);
      const float *row = a.model.weights.start + f * s.token_dim, *token = a.model.weights.token;
      float sum = 0.0f;
      SPECGATE_UNROLL(4)
      for (int j = 0; j < (of < 0 ? 0 : s.token_dim); ++j)
        sum += row[j] * token[static_cast<size_t>(of) * s.token_dim + j];
      return sum;
    }
    float sum = state.run[b * s.state_dim + f];
    SPECGATE_UNROLL(1)
    for (int k = 0; k < s.top_k; ++k) {
      const int e = chosen(b, k);
      if (e < 0) continue;
      const size_t row = static_cast<size_t>(layer) * s.experts + e;
      sum += (weight(b, k) + 0.5f) * a.model.weights.expert[row * s.state_dim + f];
    }
    return sum;
  }
  SPECGATE_FN float mean(int b, int c, int f) const {
    const float old = state.means[(b * 2 + c) * s.state_dim + f];
    if (layer >= 0) return old;
    const float decay = c ? s.mean_1 : s.mean_0;
    return decay * old + (1.0f - decay) * state.run[b * s.state_dim + f];
  }
  SPECGATE_FN float run_seen(int b, int f) const { return run(b, f) / sqrtf(static_cast<float>(layer + 2)); }

  // ---- inputs of the maps

  SPECGATE_FN float feature(int b, int k) const {
    if (k < at.now) return token(b, 2 - k / s.token_dim, k % s.token_dim);
    if (k < at.before) return layer < 0 ? 0.0f : routed(b, layer, k - at.now) * scale;
    if (k < at.run) return layer < 1 ? 0.0f : routed(b, layer - 1, k - at.before) * scale;
    if (k < at.means) return run_seen(b, k - at.run);
    if (k < at.past) {
      const int i = k - at.means;
      return 2.0f * mean(b, i / s.state_dim, i % s.state_dim) / sqrtf(static_cast<float>(s.layers + 1));
    }
    if (k < at.hidden) {
      const int i = k - at.past, X = s.horizons * s.experts, c = i / X, e = i % s.experts;
      const int target = column_at(s, layer, i % X / s.experts) % s.layers;
      return (c ? use(b, target, c - 1, e) : routed(b, target, e)) * scale;
    }
    const int i = k - at.hidden, d = i % s.hidden;
    if (layer < 0) return 0.0f;
    if (i < s.hidden) return unit(b, d);
    if (i < 2 * s.hidden)
      return unit(b, d) - (layer > 0 ? state.unit[static_cast<size_t>(b) * s.hidden + d] : 0.0f);
    if (i < 3 * s.hidden)
      return 2.0f * state.slow[(static_cast<size_t>(b) * s.layers + layer) * s.hidden + d];
    return record(b, kLnRms);
  }
  /// What the attention looks at: the token's embedding, then the hidden state or its stand-in.
  SPECGATE_FN float seen(int b, int k) const {
    if (k < s.token_dim) return token(b, 0, k);
    return s.hidden ? unit(b, k - s.token_dim) : run_seen(b, k - s.token_dim);
  }

  // ---- the state afterwards

  /// Values of the state of one sequence that a launch replaces, counted for :func:`update`.
  SPECGATE_FN int updates() const {
    if (!s.width) return 0;
    return layer < 0 ? s.state_dim : s.hidden + s.decays * s.experts + s.state_dim + s.top_k;
  }
  /// Brings one of them up to date. No other value of this launch may depend on it any more, except that
  /// values of different `i` are independent of each other.
  SPECGATE_FN void update(int b, int i) const {
    if (layer < 0) {
      const float fresh = run(b, i), means[2] = {mean(b, 0, i), mean(b, 1, i)};
      for (int c = 0; c < 2; ++c) state.means[(b * 2 + c) * s.state_dim + i] = means[c];
      state.run[b * s.state_dim + i] = fresh;
      return;
    }
    if (i < s.hidden) {
      const float now = unit(b, i);
      float& slow = state.slow[(static_cast<size_t>(b) * s.layers + layer) * s.hidden + i];
      slow = s.slow * slow + (1.0f - s.slow) * now;
      state.unit[static_cast<size_t>(b) * s.hidden + i] = now;
      return;
    }
    i -= s.hidden;
    if (i < s.decays * s.experts) {
      const int c = i / s.experts, e = i % s.experts;
      state.use[((static_cast<size_t>(b) * s.layers + layer) * s.decays + c) * s.experts + e] =
          use(b, layer, c, e);
      return;
    }
    i -= s.decays * s.experts;
    if (i < s.state_dim) {
      state.run[b * s.state_dim + i] = run(b, i);
      return;
    }
    i -= s.state_dim;
    state.experts[slot(b, layer) + i] = chosen(b, i);
    state.weights[slot(b, layer) + i] = weight(b, i);
  }
};

}  // namespace specgate::speculation
