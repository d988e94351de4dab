// The phases of one launch, written for a block of threads: the CUDA kernel runs them with a grid barrier in
// between (speculate_cuda.cu), and so does its emulation on the CPU (speculate_emulated.cpp).
//
// Letters: as in speculate.h. Rules that make both the same: what is in registers does not outlive one
// `each`; what one thread writes, others read after the `each` (shared memory) or in the next phase (scratch,
// through Block::load); within a phase no block reads what another one writes. Sums have a fixed order:
// nothing is added atomically.
//
// - begin: 1 / rms of the hidden states, and the routing; of few sequences by every block for itself
// - products: partial sums of the first, the attention's and the routers' maps, a chunk of inputs per item
// - attention: scores and weighted values of the tokens before, some tokens of one head per item
// - units: kUnits units of the MLP per item: their sum, activation, gate, and share of the next map's outputs
// - rows: logits, calibration and link of one horizon of one sequence per item; the state moves on
// - merge, by the last block: 1 - prod(1 - p), threshold, compaction, the entry of the ring
#pragma once

#include "speculate_inputs.h"

namespace specgate::speculation {

// ---- 16 bytes of a matrix

template <class M>
struct Columns;
template <>
struct Columns<float> {
  static constexpr int count = 4;
};
template <>
struct Columns<BFloat16> {
  static constexpr int count = 8;
};

template <class Block>
SPECGATE_FN void load_columns(const Block& block, const float* at, float (&out)[4]) {
  uint32_t words[4];
  block.load_16(at, words);
  for (int i = 0; i < 4; ++i) memcpy(&out[i], &words[i], 4);
}

template <class Block>
SPECGATE_FN void load_columns(const Block& block, const BFloat16* at, float (&out)[8]) {
  uint32_t words[4];
  block.load_16(at, words);
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = words[i] << 16, high = words[i] & 0xFFFF0000u;
    memcpy(&out[2 * i], &low, 4);
    memcpy(&out[2 * i + 1], &high, 4);
  }
}

/// out[b * out_stride + n] = sum over r < count of x[b * x_stride + r] * matrix[rows[r] * columns + n], for b
/// < live. `work` holds TILE * 8 * threads floats.
template <int TILE, class M, class Block>
SPECGATE_FN void multiply(Block& block, const M* matrix, int columns, const int* rows, int count,
                          const float* x, int x_stride, int live, float* work, float* out,
                          size_t out_stride) {
  constexpr int V = Columns<M>::count;
  const int vectors = columns / V;
  const int groups = larger(1, smaller(block.threads / vectors, count));
  block.each(groups * vectors, [&](int i) {
    const int group = i / vectors, first = (i % vectors) * V;
    float sum[TILE][V] = {};
    SPECGATE_UNROLL(4)
    for (int r = group; r < count; r += groups) {
      float row[V];
      load_columns(block, matrix + static_cast<size_t>(rows[r]) * columns + first, row);
      SPECGATE_UNROLL_ALL
      for (int b = 0; b < TILE; ++b) {
        const float value = x[b * x_stride + r];
        SPECGATE_UNROLL_ALL
        for (int j = 0; j < V; ++j) sum[b][j] += value * row[j];
      }
    }
    SPECGATE_UNROLL_ALL
    for (int b = 0; b < TILE; ++b) {
      float* to = groups > 1 ? work + (group * TILE + b) * columns : out + b * out_stride;
      if (groups == 1 && b >= live) continue;
      SPECGATE_UNROLL_ALL
      for (int j = 0; j < V; ++j) to[first + j] = sum[b][j];
    }
  });
  if (groups == 1) return;
  block.each(live * columns, [&](int i) {
    const int b = i / columns, n = i % columns;
    float sum = 0.0f;
    SPECGATE_UNROLL(4)
    for (int group = 0; group < groups; ++group) sum += work[(group * TILE + b) * columns + n];
    out[b * out_stride + n] = sum;
  });
}

/// out[i] = sum over c < chunks of partial[c * stride + place(i)], i < n. `work` holds max(threads, n)
/// floats.
template <class Block, class Place>
SPECGATE_FN void sum_chunks(Block& block, const float* partial, int chunks, size_t stride, int n, Place place,
                            float* work, float* out) {
  const int groups = larger(1, smaller(block.threads / n, chunks));
  block.each(groups * n, [&](int i) {
    const int group = i / n;
    const float* from = partial + place(i % n);
    float sum = 0.0f;
    SPECGATE_UNROLL(8)
    for (int c = group; c < chunks; c += groups) sum += block.load(from + c * stride);
    work[i] = sum;
  });
  block.each(n, [&](int i) {
    float sum = 0.0f;
    SPECGATE_UNROLL(4)
    for (int group = 0; group < groups; ++group) sum += work[group * n + i];
    out[i] = sum;
  });
}

/// How many of the bits before i are set.
template <class Block>
SPECGATE_FN int place_of(const Block& block, const uint32_t* words, int i) {
  int place = i % 32 ? block.bits_set(words[i / 32] & ((1u << (i % 32)) - 1u)) : 0;
  SPECGATE_UNROLL(1)
  for (int word = 0; word < i / 32; ++word) place += block.bits_set(words[word]);
  return place;
}

/// Sum (or largest) of values[0..n), the same for every thread. `work` holds 32 floats; wait before using it
/// again.
template <bool LARGEST, class Block>
SPECGATE_FN float reduce(Block& block, const float* values, int n, float* work) {
  block.each(32, [&](int lane) {
    float found = LARGEST ? -INFINITY : 0.0f;
    SPECGATE_UNROLL(4)
    for (int i = lane; i < n; i += 32) found = LARGEST ? fmaxf(found, values[i]) : found + values[i];
    work[lane] = found;
  });
  float found = work[0];
  SPECGATE_UNROLL(4)
  for (int lane = 1; lane < 32; ++lane) found = LARGEST ? fmaxf(found, work[lane]) : found + work[lane];
  return found;
}

// ---- records

template <class Block>
SPECGATE_FN void write_norms(Block& block, const SpeculationArgs& a, int b, float* out) {
  const SpeculationSizes& s = a.model.sizes;
  float *work = block.shared + shared_records(s), *sums = work + block.threads;
  block.each(block.threads, [&](int i) {
    float sum = 0.0f;
    SPECGATE_UNROLL(4)
    for (int d = i; d < s.hidden; d += block.threads) {
      const float x = scalar_at(a.input.hidden, a.input.hidden_type, static_cast<size_t>(b) * s.hidden + d);
      sum += x * x;
    }
    work[i] = sum;
  });
  const float mean = reduce<false>(block, work, block.threads, sums) / static_cast<float>(s.hidden);
  block.each(1, [&](int) {
    const bool good = finite(mean);
    const float rms = sqrtf(mean + s.unit_eps);
    out[kUnitNorm] = good ? 1.0f / rms : 0.0f;
    out[kRouterNorm] = good ? 1.0f / sqrtf(mean + s.router_eps) : 0.0f;
    out[kLnRms] = good ? logf(rms) : 0.0f;
    out[kRefused] = good ? 0.0f : 1.0f;
  });
}

/// Before the first phase: the records, of few sequences in every block's shared memory, of many in scratch.
template <class Block>
SPECGATE_FN void begin(Block& block, const SpeculationArgs& a) {
  const SpeculationSizes& s = a.model.sizes;
  if (a.input.layer < 0) return;
  const int step = a.plan.spread ? block.count : 1;
  for (int b = a.plan.spread ? block.index : 0; b < a.input.batch; b += step) {
    float* out = (a.plan.spread ? a.scratch + a.at.records : block.shared) + b * record_size(s);
    if (s.hidden) write_norms(block, a, b, out);
    block.each(s.width ? s.top_k : 0, [&](int k) {
      const size_t i = static_cast<size_t>(b) * s.top_k + k;
      const int e = index_at(a.input.experts, a.input.experts_bytes, i, s.experts);
      const float weight = scalar_at(a.input.weights, a.input.weights_type, i);
      out[kChosen + k] = static_cast<float>(e);
      out[kChosen + s.top_k + k] = e >= 0 && finite(weight) ? weight : 0.0f;
    });
  }
}

// ---- products

/// One work item: rows `first` to `first + inputs` of a matrix, and what its inputs are.
template <class M>
struct ProductItem {
  enum { Router, First, Attend } kind;
  const M* matrix;
  int columns, first, inputs;
  float* out;  // [B, columns]
};

template <class M>
SPECGATE_FN ProductItem<M> product_of(const SpeculationArgs& a, int item) {
  const SpeculationSizes& s = a.model.sizes;
  const SpeculationWeights& w = a.model.weights;
  const Plan& plan = a.plan;
  const size_t point = static_cast<size_t>(a.input.layer + 1), batch = static_cast<size_t>(a.input.batch);
  const auto cut = [&](int inputs, int chunk) { return smaller(plan.chunk, inputs - chunk * plan.chunk); };
  ProductItem<M> found{};
  if (item < plan.first_chunks) {  // the largest matrix comes first
    found.kind = ProductItem<M>::First;
    found.columns = pad8(s.width);
    found.first = item * plan.chunk;
    found.inputs = cut(first_inputs(s, a.input.layer), item);
    found.matrix = static_cast<const M*>(w.first) + point * feature_layout(s).size * found.columns;
    found.out = a.scratch + a.at.first + item * batch * found.columns;
    return found;
  }
  item -= plan.first_chunks;
  if (item < plan.attend_chunks) {
    found.kind = ProductItem<M>::Attend;
    found.columns = pad8(3 * attention_width(s));
    found.first = item * plan.chunk;
    found.inputs = cut(attend_inputs(s, a.input.layer), item);
    found.matrix = static_cast<const M*>(w.attend) + point * attend_size(s) * found.columns;
    found.out = a.scratch + a.at.attend + item * batch * found.columns;
    return found;
  }
  item -= plan.attend_chunks;
  const int horizon = item / plan.router_chunks, chunk = item % plan.router_chunks;
  found.kind = ProductItem<M>::Router;
  found.columns = pad8(s.experts);
  found.first = chunk * plan.chunk;
  found.inputs = cut(s.hidden, chunk);
  found.matrix = static_cast<const M*>(w.router) + (point + horizon) * s.hidden * found.columns;
  found.out = a.scratch + a.at.router + item * batch * found.columns;
  return found;
}

template <class M, class Block>
SPECGATE_FN void phase_products(Block& block, const SpeculationArgs& a) {
  const Inputs<Block> in(a, block);
  const int tile = a.input.batch == 1 ? 1 : kTile;
  constexpr int chunk = kLargestChunk;
  float *raw = block.shared + shared_records(a.model.sizes), *x = raw + kTile * chunk;
  int* rows = reinterpret_cast<int*>(x + kTile * chunk);
  uint32_t* words = reinterpret_cast<uint32_t*>(rows + chunk);
  float* work = reinterpret_cast<float*>(words + chunk / 32);
  for (int item = block.index; item < a.plan.product_items; item += block.count) {
    const ProductItem<M> product = product_of<M>(a, item);
    for (int b0 = 0; b0 < a.input.batch; b0 += tile) {
      const int live = smaller(tile, a.input.batch - b0);
      block.each(a.plan.chunk * tile, [&](int i) {
        const int b = i / a.plan.chunk, r = i % a.plan.chunk, k = product.first + r;
        float value = 0.0f;
        if (b < live && r < product.inputs) {
          if (product.kind == ProductItem<M>::First) {
            value = in.feature(b0 + b, k);
          } else if (product.kind == ProductItem<M>::Attend) {
            value = in.seen(b0 + b, k);
          } else {
            value = in.hidden(b0 + b, k) * in.record(b0 + b, kRouterNorm);
          }
        }
        raw[b * chunk + r] = value;
      });
      // Most features are zeros of one-hot vectors: their rows of the matrix are not read.
      block.ballot(
          a.plan.chunk,
          [&](int r) {
            bool any = false;
            for (int b = 0; b < tile; ++b) any |= raw[b * chunk + r] != 0.0f;
            return any;
          },
          words);
      block.each(a.plan.chunk, [&](int r) {
        if (!(words[r / 32] >> (r % 32) & 1u)) return;
        const int place = place_of(block, words, r);
        rows[place] = product.first + r;
        for (int b = 0; b < tile; ++b) x[b * chunk + place] = raw[b * chunk + r];
      });
      const int count = place_of(block, words, a.plan.chunk);
      float* out = product.out + static_cast<size_t>(b0) * product.columns;
      if (tile == 1) {
        multiply<1>(block, product.matrix, product.columns, rows, count, x, chunk, live, work, out,
                    product.columns);
      } else {
        multiply<kTile>(block, product.matrix, product.columns, rows, count, x, chunk, live, work, out,
                        product.columns);
      }
    }
  }
}

}  // namespace specgate::speculation
