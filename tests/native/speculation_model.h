// A speculation model with random weights, for native tests. Letters: as in csrc/speculate.h.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "speculate_layout.h"

namespace specgate::test {

/// Owns what the model points to. Two of the same seed are equal; each has its own state.
struct RandomModel {
  SpeculationModel model;
  std::mt19937 random;
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<std::pair<float*, size_t>> floats_of_state;

  RandomModel(const SpeculationSizes& sizes, unsigned seed) : random(seed) {
    SpeculationSizes& s = model.sizes = sizes;
    SpeculationWeights& w = model.weights;
    SpeculationState& t = model.state;
    const int P = s.layers + 1, X = s.horizons * s.experts, all = attention_width(s);
    if (s.routers) {
      w.router = matrix(s.layers * s.hidden, s.experts, 1.0f / std::sqrt(static_cast<float>(s.hidden)));
      w.router_bias = floats(s.layers * s.experts, 0.1f);
      w.correction = floats(s.layers * s.experts, 0.1f);
      uint8_t* corrected = make<uint8_t>(s.layers);
      for (int i = 0; i < s.layers; ++i) corrected[i] = i % 2;
      w.corrected = corrected;
      w.trust = floats(P * s.horizons, 1.0f);
    }
    if (s.width) {
      const int F = feature_layout(s).size;
      w.first = matrix(P * F, s.width, 1.0f / std::sqrt(static_cast<float>(F)));
      w.first_bias = floats(P * s.width, 0.3f);
      w.gate = floats(P * s.experts * s.width, 0.3f);
      w.gate_bias = floats(P * s.width, 1.0f);
      w.more = matrix((s.depth - 1) * P * s.width, s.width, 1.0f / std::sqrt(static_cast<float>(s.width)));
      w.more_bias = floats((s.depth - 1) * P * s.width, 0.3f);
      w.last = matrix(P * s.width, X, 1.0f / std::sqrt(static_cast<float>(s.width)));
      w.last_bias = floats(P * X, 0.3f);
      w.attend = matrix(P * attend_size(s), 3 * all, 1.0f / std::sqrt(static_cast<float>(attend_size(s))));
      w.attend_bias = floats(P * 3 * all, 0.3f);
      float* penalty = floats(P * s.heads, 1.0f);
      for (int i = 0; i < P * s.heads; ++i) penalty[i] = 0.1f + std::abs(penalty[i]);
      w.penalty = penalty;
      w.token = floats(s.vocab * s.token_dim, 1.0f);
      w.expert = floats(s.layers * s.experts * s.state_dim, 0.5f);
      w.start = floats(s.state_dim * s.token_dim, 0.5f);
      float* decay = make<float>(s.decays);
      for (int c = 0; c < s.decays; ++c)
        decay[c] = 0.5f + 0.4f * static_cast<float>(c) / static_cast<float>(s.decays);
      w.decay = decay;
    }
    if (s.table_rows) {
      w.table = matrix(s.table_rows * s.table_columns, s.experts, 1.0f, false);
      int32_t* column = make<int32_t>(2 * s.layers);
      for (int i = 0; i < 2 * s.layers; ++i) column[i] = i % s.table_columns;
      w.column = column;
    }
    w.scale = floats(P * s.horizons * s.scale_experts, 1.0f);
    w.offset = floats(P * s.horizons * s.scale_experts, 1.0f);
    w.threshold = make<float>(P * s.horizons);
    const size_t B = static_cast<size_t>(s.batch), BL = B * s.layers;
    t.ids = make<int32_t>(3 * B, -1);
    t.count = make<int32_t>(B);
    t.live = make<uint8_t>(B);
    std::memset(t.live, 1, B);
    t.experts = make<int32_t>(BL * s.top_k, -1);
    t.weights = kept(BL * s.top_k);
    t.use = kept(BL * s.decays * s.experts);
    t.run = kept(B * s.state_dim);
    t.means = kept(B * 2 * s.state_dim);
    t.unit = kept(B * s.hidden);
    t.slow = kept(BL * s.hidden);
    t.memory = kept(B * P * s.context * 2 * all);
  }

  template <class T>
  T* make(size_t count, int byte = 0) {
    memory.push_back(
        std::make_unique<char[]>(count * sizeof(T) + 16));  // a little more: never a null pointer
    std::memset(memory.back().get(), byte, count * sizeof(T) + 16);
    return reinterpret_cast<T*>(memory.back().get());
  }
  float* kept(size_t count) {
    float* found = make<float>(count);
    floats_of_state.emplace_back(found, count);
    return found;
  }
  float* floats(size_t count, float spread) {
    std::normal_distribution<float> normal(0.0f, spread);
    float* found = make<float>(count);
    for (size_t i = 0; i < count; ++i) found[i] = normal(random);
    return found;
  }
  /// Rows padded with zeros to a multiple of 8, in the model's type.
  void* matrix(size_t rows, int columns, float spread, bool padded = true) {
    std::normal_distribution<float> normal(0.0f, spread);
    const int width = padded ? pad8(columns) : columns;
    char* found = make<char>(rows * width * 4);
    for (size_t r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        float value = normal(random);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        if (model.sizes.bf16) std::memcpy(found + (r * width + c) * 2, &high, 2);
        if (!model.sizes.bf16) std::memcpy(found + (r * width + c) * 4, &value, 4);
      }
    return found;
  }
};

/// Inputs of one launch.
struct RandomInput {
  SpeculationInput input;
  std::vector<float> hidden, weights;
  std::vector<int64_t> experts, ids;

  RandomInput(const SpeculationSizes& s, int layer, int batch, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    for (int i = 0; i < batch * s.hidden; ++i) hidden.push_back(normal(random));
    for (int b = 0; b < batch; ++b)
      for (int k = 0, first = static_cast<int>(random() % s.experts); k < s.top_k; ++k) {
        experts.push_back((first + 2 * k) % s.experts);
        weights.push_back(1.0f / static_cast<float>(k + 1));
      }
    for (int b = 0; b < batch; ++b) ids.push_back(static_cast<int64_t>(random() % s.vocab));
    input.layer = layer;
    input.batch = batch;
    input.hidden = hidden.data();
    input.experts = experts.data();
    input.weights = weights.data();
    input.ids = ids.data();
  }
};

inline SpeculationSizes small_sizes(int batch) {
  SpeculationSizes s;
  s.layers = 2, s.experts = 11, s.top_k = 3, s.horizons = 3, s.batch = batch, s.vocab = 13, s.hidden = 70;
  s.routers = 1, s.width = 20, s.depth = 2, s.token_dim = 5, s.state_dim = 6, s.decays = 2, s.heads = 2;
  s.head_width = 4, s.context = 70, s.table_rows = 13, s.table_columns = 3, s.scale_experts = 11;
  return s;
}

}  // namespace specgate::test
