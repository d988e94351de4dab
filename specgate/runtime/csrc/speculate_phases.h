// The later phases of a launch (see speculate_kernel.h): attention, units, rows, merge.
#pragma once

#include "speculate_kernel.h"

namespace specgate::speculation {

// ---- attention: what some of the tokens before give to one head of one sequence

/// Where one token's keys and values of a point lie: [2, A, head_width].
SPECGATE_FN size_t memory_at(const SpeculationSizes& s, int b, int point, int token) {
  const size_t row = (static_cast<size_t>(b) * (s.layers + 1) + point) * s.context + token % s.context;
  return row * 2 * attention_width(s);
}

template <class Block>
SPECGATE_FN void phase_attention(Block& block, const SpeculationArgs& a) {
  const Inputs<Block> in(a, block);
  const SpeculationSizes& s = a.model.sizes;
  const int width = s.head_width, all = attention_width(s), columns = pad8(3 * all);
  float *work = block.shared + shared_records(s), *qkv = work + larger(kThreads, 3 * width);
  float *scores = qkv + 3 * width, *sums = scores + kTokens, *parts_of = sums + 32;
  for (int item = block.index; item < a.plan.attention_items; item += block.count) {
    const int part = item % a.plan.token_chunks, head = item / a.plan.token_chunks % s.heads;
    const int b = item / a.plan.token_chunks / s.heads, newest = in.tokens(b) - 1;
    const int tokens = smaller(newest + 1, s.context) - part * kTokens;  // of this part and later ones
    if (tokens <= 0) continue;
    const int here = smaller(tokens, kTokens);
    sum_chunks(
        block, a.scratch + a.at.attend, a.plan.attend_chunks, static_cast<size_t>(a.input.batch) * columns,
        3 * width, [&](int i) { return b * columns + i / width * all + head * width + i % width; }, work,
        qkv);
    const float* bias = a.model.weights.attend_bias + static_cast<size_t>(in.point) * 3 * all;
    block.each(3 * width, [&](int i) { qkv[i] += bias[i / width * all + head * width + i % width]; });
    const float penalty = a.model.weights.penalty[in.point * s.heads + head];
    const float scale = 1.0f / sqrtf(static_cast<float>(width));
    block.each(here, [&](int i) {
      const int age = part * kTokens + i;
      const float* key = qkv + width;
      if (age > 0) key = in.state.memory + memory_at(s, b, in.point, newest - age) + head * width;
      float score = 0.0f;
      for (int j = 0; j < width; ++j) score += qkv[j] * key[j];
      scores[i] = score * scale - penalty * static_cast<float>(age);
    });
    const float largest = reduce<true>(block, scores, here, sums);
    block.each(here, [&](int i) { scores[i] = expf(scores[i] - largest); });
    const float total = reduce<false>(block, scores, here, sums);
    block.each(16 * width, [&](int i) {
      const int j = i % width;
      float sum = 0.0f;
      for (int t = i / width; t < here; t += 16) {
        const int age = part * kTokens + t;
        const float* value = qkv + 2 * width;
        if (age > 0) value = in.state.memory + memory_at(s, b, in.point, newest - age) + all + head * width;
        sum += scores[t] * value[j];
      }
      parts_of[i] = sum;
    });
    float* out = a.scratch + a.at.attention + static_cast<size_t>(item) * (width + 2);
    block.each(width + 2, [&](int i) {
      float value = i == 0 ? largest : total;
      if (i > 1) {
        value = 0.0f;
        for (int g = 0; g < 16; ++g) value += parts_of[g * width + i - 2];
      }
      out[i] = value;
    });
    if (part > 0) continue;
    float* remember = in.state.memory + memory_at(s, b, in.point, newest) + head * width;  // no item reads it
    block.each(2 * width, [&](int i) { remember[i / width * all + i % width] = qkv[width + i]; });
  }
}

/// Feature i of the attention of sequence b, put together from the parts.
template <class Block>
SPECGATE_FN float attended(const Inputs<Block>& in, int b, int i) {
  const SpeculationSizes& s = in.s;
  const int tokens = smaller(in.tokens(b), s.context), head = i / s.head_width;
  const size_t first = (static_cast<size_t>(b) * s.heads + head) * in.a.plan.token_chunks;
  const float* from = in.a.scratch + in.a.at.attention + first * (s.head_width + 2);
  float largest = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int part = 0; part < parts(tokens, kTokens); ++part)
    largest = fmaxf(largest, in.block.load(from + part * (s.head_width + 2)));
  for (int part = 0; part < parts(tokens, kTokens); ++part) {
    const float* one = from + part * (s.head_width + 2);
    const float factor = expf(in.block.load(one) - largest);
    total += factor * in.block.load(one + 1);
    sum += factor * in.block.load(one + 2 + i % s.head_width);
  }
  return total > 0.0f ? sum / total : 0.0f;  // no token was begun
}

// ---- units

/// Stage 0 activates the first map's sums; stage n > 0 those of the (n - 1)th further one. Then each unit's
/// share of the next map: a further one, or the last.
template <class M, class Block>
SPECGATE_FN void phase_units(Block& block, const SpeculationArgs& a, int stage) {
  const Inputs<Block> in(a, block);
  const SpeculationSizes& s = a.model.sizes;
  const SpeculationWeights& w = a.model.weights;
  const int W = s.width, padded = pad8(W), all = attention_width(s), point = in.point, batch = a.input.batch;
  const bool last = stage == s.depth - 1;
  const int columns = last ? pad8(s.horizons * s.experts) : padded;
  const size_t P = static_cast<size_t>(s.layers) + 1;
  const M* next = last ? static_cast<const M*>(w.last) + static_cast<size_t>(point) * W * columns
                       : static_cast<const M*>(w.more) + (stage * P + point) * W * columns;
  const M* first = static_cast<const M*>(w.first) + static_cast<size_t>(point) * in.at.size * padded;
  float *heads = block.shared + shared_records(s), *values = heads + kUnitRows * all;
  int* rows = reinterpret_cast<int*>(values + kUnitRows * kUnits);
  float* sums = reinterpret_cast<float*>(rows + kUnits);
  float* work = sums + larger(kThreads, kUnitRows * kUnits);
  for (int item = block.index; item < a.plan.unit_items; item += block.count) {
    const int chunk = item % a.plan.unit_chunks, b0 = item / a.plan.unit_chunks * kUnitRows;
    const int live = smaller(kUnitRows, batch - b0), u0 = chunk * kUnits, units = smaller(kUnits, W - u0);
    const int from = stage == 0 ? a.plan.first_chunks : a.plan.unit_chunks;
    const float* partial = a.scratch + (stage == 0 ? a.at.first : a.at.units[(stage - 1) & 1]);
    sum_chunks(
        block, partial, from, static_cast<size_t>(batch) * padded, live * units,
        [&](int i) { return (b0 + i / units) * padded + u0 + i % units; }, sums, values);
    if (stage == 0 && all)
      block.each(live * all, [&](int i) { heads[i] = attended(in, b0 + i / all, i % all); });
    block.each(live * units, [&](int i) {
      const int b = i / units, u = u0 + i % units;
      float* kept = a.scratch + a.at.values + static_cast<size_t>(b0 + b) * W + u;
      if (stage > 0) {
        const float x = values[i] + w.more_bias[((stage - 1) * P + point) * W + u];
        values[i] = *kept + gelu(x);  // written by this very item of the stage before
      } else {
        float x = values[i] + w.first_bias[point * W + u], gate = w.gate_bias[point * W + u];
        for (int j = 0; j < all; ++j)
          x += heads[b * all + j] * float_of(first[static_cast<size_t>(in.at.attention + j) * padded + u]);
        SPECGATE_UNROLL(1)
        for (int k = 0; k < in.choices(); ++k) {
          const int e = in.chosen(b0 + b, k);
          if (e < 0) continue;
          gate +=
              in.weight(b0 + b, k) * in.scale * w.gate[(static_cast<size_t>(point) * s.experts + e) * W + u];
        }
        values[i] = gelu(x) * gate;
      }
      if (!last) *kept = values[i];
    });
    block.each(units, [&](int i) { rows[i] = u0 + i; });
    float* out = a.scratch + a.at.units[stage & 1] + (static_cast<size_t>(chunk) * batch + b0) * columns;
    if (batch == 1) {
      multiply<1>(block, next, columns, rows, units, values, units, 1, work, out, columns);
    } else {
      for (int b = 0; b < live; b += kTile)
        multiply<kTile>(block, next, columns, rows, units, values + b * units, units,
                        smaller(kTile, live - b), work, out + static_cast<size_t>(b) * columns, columns);
    }
  }
}

// ---- rows

/// The target router's scores: replaced by what it chooses by, and centred between the K-th and the next.
template <class Block>
SPECGATE_FN void router_scores(Block& block, const SpeculationArgs& a, int target, float* scores,
                               float* work) {
  const SpeculationSizes& s = a.model.sizes;
  const SpeculationWeights& w = a.model.weights;
  const bool centre = s.top_k > 1 && s.top_k < s.experts;
  block.each(s.experts, [&](int e) {
    const int place = target * s.experts + e;
    const float score = scores[e] + w.router_bias[place];
    scores[e] = w.corrected[target] ? sigmoid(score) + w.correction[place] : score;
    if (e < 2) work[e] = 0.0f;
  });
  if (!centre) return;
  block.each(s.experts, [&](int e) {
    int above = 0;
    SPECGATE_UNROLL(8)
    for (int other = 0; other < s.experts; ++other)
      above += scores[other] > scores[e] || (scores[other] == scores[e] && other < e);
    if (above == s.top_k - 1) work[0] = scores[e];
    if (above == s.top_k) work[1] = scores[e];
  });
  const float middle = 0.5f * (work[0] + work[1]);
  block.each(s.experts, [&](int e) { scores[e] -= middle; });
}

template <class M, class Block>
SPECGATE_FN void phase_rows(Block& block, const SpeculationArgs& a) {
  const Inputs<Block> in(a, block);
  const SpeculationSizes& s = a.model.sizes;
  const SpeculationWeights& w = a.model.weights;
  const int E = s.experts, X = s.horizons * E, batch = a.input.batch, router_columns = pad8(E);
  float *scores = block.shared + shared_records(s), *logits = scores + E, *sums = logits + E,
        *work = sums + 32;
  for (int item = block.index; item < a.plan.row_items; item += block.count) {
    const int b = item / a.plan.rows, h = item % a.plan.rows, cell = in.point * s.horizons + h;
    const int column = column_at(s, in.layer, h);
    const bool within = h < a.plan.within;
    if (within) {
      const size_t of_b = static_cast<size_t>(b) * router_columns,
                   stride = static_cast<size_t>(batch) * router_columns;
      sum_chunks(
          block, a.scratch + a.at.router + h * a.plan.router_chunks * stride, a.plan.router_chunks, stride, E,
          [&](int e) { return of_b + e; }, work, scores);
      router_scores(block, a, column, scores, sums);
    }
    if (s.width) {
      const size_t of_b = static_cast<size_t>(b) * pad8(X) + h * E;
      sum_chunks(
          block, a.scratch + a.at.units[(s.depth - 1) & 1], a.plan.unit_chunks,
          static_cast<size_t>(batch) * pad8(X), E, [&](int e) { return of_b + e; }, work, logits);
    }
    const int id = w.table && !within && (!s.width || in.layer < 0) ? in.id(b, 0) : -1;
    int row = id < 0 ? -1 : w.row ? w.row[id] : id;
    if (w.row && row < 0) row = s.table_rows - 1;
    const int place = w.table && !within && (!s.width || in.layer < 0) ? w.column[column] : -1;
    block.each(E, [&](int e) {
      float logit = 0.0f;
      if (s.width) logit = logits[e] + w.last_bias[static_cast<size_t>(in.point) * X + h * E + e];
      if (within) logit += w.trust[cell] * scores[e];
      if (row >= 0 && place >= 0)
        logit += float_of(
            static_cast<const M*>(w.table)[(static_cast<size_t>(row) * s.table_columns + place) * E + e]);
      const int fitted = cell * s.scale_experts + (s.scale_experts > 1 ? e : 0);
      logits[e] = logit * w.scale[fitted] + w.offset[fitted];
    });
    float largest = 0.0f, total = 1.0f;
    if (s.softmax) {
      largest = reduce<true>(block, logits, E, sums);
      block.each(E, [&](int e) { logits[e] = expf(logits[e] - largest); });
      total = reduce<false>(block, logits, E, sums);
    }
    const bool counts = !in.refused(b) && in.state.live[b];
    float* out = a.scratch + a.at.p + static_cast<size_t>(b * s.horizons + h) * E;
    block.each(E, [&](int e) {
      const float p = s.softmax ? logits[e] / total : sigmoid(logits[e]);
      out[e] = counts && p > 0.0f ? p : 0.0f;  // also where it is not a number
    });
  }
  const int each = in.updates(), all = each * batch, share = parts(all, block.count),
            mine = block.index * share;
  block.each(larger(0, smaller(share, all - mine)),
             [&](int i) { in.update((mine + i) / each, (mine + i) % each); });
}

// ---- merge

/// Threads of the last block. `store` writes a word of the ring, `publish` releases the sequence number.
template <class Block>
SPECGATE_FN void merge(Block& block, const SpeculationArgs& a) {
  const Inputs<Block> in(a, block);
  const SpeculationSizes& s = a.model.sizes;
  const int E = s.experts, n = a.plan.rows * E, batch = a.input.batch;
  float* merged = block.shared + shared_records(s);
  uint32_t* words = reinterpret_cast<uint32_t*>(merged + n);
  const uint64_t sequence = *a.sequence + 1;
  unsigned char* slot = a.ring.memory + sequence % a.ring.slots * a.ring.stride;
  block.each(n, [&](int i) {
    float missed = 1.0f;
    for (int b = 0; b < batch; ++b)
      missed *= 1.0f - block.load(a.scratch + a.at.p + static_cast<size_t>(b) * s.horizons * E + i);
    merged[i] = 1.0f - missed;
  });
  const float* threshold = a.model.weights.threshold + in.point * s.horizons;
  block.ballot(n, [&](int i) { return merged[i] >= threshold[i / E]; }, words);
  block.before_storing();
  block.each(n, [&](int i) {
    if (!(words[i / 32] >> (i % 32) & 1u)) return;
    const int place = place_of(block, words, i);
    if (place >= a.ring.capacity) return;
    uint32_t p;
    memcpy(&p, &merged[i], 4);
    const uint32_t layer = column_at(s, in.layer, i / E) % s.layers, expert = i % E, ahead = i / E + 1;
    uint64_t* to = reinterpret_cast<uint64_t*>(slot + sizeof(ForecastSlot)) + 2 * place;
    block.store(to, layer | static_cast<uint64_t>(expert) << 32);
    block.store(to + 1, p | static_cast<uint64_t>(ahead) << 32);
  });
  block.each(1, [&](int) {
    const int found = place_of(block, words, n);
    int ignored = 0;
    for (int b = 0; b < batch; ++b) ignored += in.refused(b);
    ForecastSlot* head = reinterpret_cast<ForecastSlot*>(slot);
    block.store(&head->about, static_cast<uint32_t>(in.layer) |
                                  static_cast<uint64_t>(smaller(found, a.ring.capacity)) << 32);
    block.store(&head->ignored, static_cast<uint64_t>(ignored));
    *a.sequence = sequence;
    block.publish(&head->sequence, sequence);
  });
  if (in.layer >= 0 || !in.state.ids) return;
  block.each(batch, [&](int b) {
    const int ids[3] = {in.id(b, 0), in.id(b, 1), in.id(b, 2)};
    for (int back = 0; back < 3; ++back) in.state.ids[b * 3 + back] = ids[back];
    ++in.state.count[b];
  });
}

/// Phase `number` of a.plan.phases; the grid waits after each.
template <class M, class Block>
SPECGATE_FN void run_phase(Block& block, const SpeculationArgs& a, int number) {
  const SpeculationSizes& s = a.model.sizes;
  if (a.plan.product_items > 0 && number-- == 0) return phase_products<M>(block, a);
  if (s.heads && number-- == 0) return phase_attention(block, a);
  if (s.width && number < s.depth) return phase_units<M>(block, a, number);
  phase_rows<M>(block, a);
}

}  // namespace specgate::speculation
