// The computation of speculate.h on the CPU, sequence by sequence, in plain loops. The oracle of the device's
// kernel: it shares no code with it but sizes and conversions of numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "floats.h"
#include "speculate_gemv.h"
#include "speculate_layout.h"

namespace specgate {

namespace {

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }
float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float scalar_at(const void* values, Scalar type, size_t i) {
  if (type == Scalar::F32) return static_cast<const float*>(values)[i];
  const uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == Scalar::BF16 ? float_of_bf16(bits) : float_of_f16(bits);
}

int index_at(const void* values, int bytes, size_t i, int end) {
  const int64_t x =
      bytes == 8 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
  return x >= 0 && x < end ? static_cast<int>(x) : -1;
}

template <class M>
class CpuSpeculation : public Speculation {
 public:
  CpuSpeculation(const SpeculationModel& model, int slots)
      : Speculation(std::make_shared<ForecastRing>(slots, model.sizes.horizons * model.sizes.experts)),
        s_(model.sizes),
        w_(model.weights),
        state_(model.state),
        model_(model) {
    const FeatureLayout at = feature_layout(s_);
    features_.reserve(static_cast<size_t>(at.size));
    unit_.resize(static_cast<size_t>(s_.hidden));
    hidden_.resize(static_cast<size_t>(s_.hidden));
    const int wide = larger(larger(pad8(s_.width), pad8(s_.horizons * s_.experts)),
                            larger(pad8(3 * attention_width(s_)), pad8(s_.experts)));
    sums_.resize(static_cast<size_t>(wide));
    values_.resize(static_cast<size_t>(pad8(s_.width)));
    logits_.resize(static_cast<size_t>(pad8(s_.horizons * s_.experts)));
    missed_.resize(static_cast<size_t>(s_.horizons * s_.experts));
    scores_.resize(static_cast<size_t>(larger(s_.context, s_.experts)));
    expert_.resize(static_cast<size_t>(s_.top_k));
    weight_.resize(static_cast<size_t>(s_.top_k));
  }

  void launch(const SpeculationInput& input, uintptr_t) override {
    check_input(model_, input);
    in_ = input;
    layer_ = input.layer;
    rows_ = horizons_at(s_, layer_);
    within_ = within_at(s_, layer_);
    std::fill(missed_.begin(), missed_.end(), 1.0f);
    int ignored = 0;
    for (int b = 0; b < input.batch; ++b) ignored += !sequence(b);
    publish(ignored);
  }

 private:
  size_t point() const { return static_cast<size_t>(layer_ + 1); }

  /// One sequence; false if its hidden state is not finite.
  bool sequence(int b) {
    b_ = static_cast<size_t>(b);
    if (layer_ < 0) begin_token();
    const bool good = read_hidden();
    for (int k = 0; k < (s_.width && layer_ >= 0 ? s_.top_k : 0); ++k) {
      const size_t i = b_ * s_.top_k + k;
      const float weight = scalar_at(in_.weights, in_.weights_type, i);
      expert_[k] = index_at(in_.experts, in_.experts_bytes, i, s_.experts);
      weight_[k] = expert_[k] >= 0 && std::isfinite(weight) ? weight : 0.0f;
    }
    if (s_.width) pass_layer();
    std::fill(logits_.begin(), logits_.end(), 0.0f);
    if (s_.width) add_mlp();
    for (int h = 0; h < rows_; ++h) {
      float* logits = logits_.data() + h * s_.experts;
      if (h < within_) {
        add_router(h, logits);
      } else if (w_.table && (!s_.width || layer_ < 0)) {
        add_table(h, logits);
      }
      if (good && state_.live[b_]) merge(h, logits);
    }
    if (s_.width && s_.hidden && layer_ >= 0) remember_hidden();
    return good;
  }

  void begin_token() {
    int32_t* ids = state_.ids + b_ * 3;
    ids[2] = ids[1];
    ids[1] = ids[0];
    ids[0] = index_at(in_.ids, in_.ids_bytes, b_, s_.vocab);
    ++state_.count[b_];
    if (!s_.width) return;
    float* run = state_.run + b_ * s_.state_dim;
    for (int c = 0; c < 2; ++c) {
      const float decay = c ? s_.mean_1 : s_.mean_0;
      float* mean = state_.means + (b_ * 2 + c) * s_.state_dim;
      for (int f = 0; f < s_.state_dim; ++f) mean[f] = decay * mean[f] + (1.0f - decay) * run[f];
    }
    for (int f = 0; f < s_.state_dim; ++f) {
      run[f] = 0.0f;
      for (int j = 0; j < s_.token_dim && ids[0] >= 0; ++j)
        run[f] += w_.start[f * s_.token_dim + j] * w_.token[static_cast<size_t>(ids[0]) * s_.token_dim + j];
    }
  }

  bool read_hidden() {
    if (!s_.hidden || layer_ < 0) return true;
    float lanes[8] = {};
    for (int d = 0; d < s_.hidden; ++d)
      hidden_[d] = scalar_at(in_.hidden, in_.hidden_type, b_ * s_.hidden + d);
    int d = 0;
    for (; d + 8 <= s_.hidden; d += 8)
      for (int i = 0; i < 8; ++i) lanes[i] += hidden_[d + i] * hidden_[d + i];
    for (; d < s_.hidden; ++d) lanes[d % 8] += hidden_[d] * hidden_[d];
    float mean = 0.0f;
    for (const float lane : lanes) mean += lane;
    mean /= static_cast<float>(s_.hidden);
    const bool good = std::isfinite(mean);
    if (!good) std::fill(hidden_.begin(), hidden_.end(), 0.0f);
    const float rms = std::sqrt(mean + s_.unit_eps);
    router_norm_ = good ? 1.0f / std::sqrt(mean + s_.router_eps) : 0.0f;
    ln_rms_ = good ? std::log(rms) : 0.0f;
    for (int i = 0; i < s_.hidden; ++i) unit_[i] = good ? hidden_[i] / rms : 0.0f;
    return good;
  }

  size_t layer_of(int layer) const { return b_ * s_.layers + layer; }

  /// The state that must hold this token before its features are read: routing, use, the running state.
  void pass_layer() {
    if (layer_ < 0) return;
    float* run = state_.run + b_ * s_.state_dim;
    float* use = state_.use + layer_of(layer_) * s_.decays * s_.experts;
    for (int c = 0; c < s_.decays; ++c)
      for (int e = 0; e < s_.experts; ++e) use[c * s_.experts + e] *= w_.decay[c];
    for (int k = 0; k < s_.top_k; ++k) {
      const int e = expert_[k];
      state_.experts[layer_of(layer_) * s_.top_k + k] = e;
      state_.weights[layer_of(layer_) * s_.top_k + k] = weight_[k];
      if (e < 0) continue;
      for (int c = 0; c < s_.decays; ++c) use[c * s_.experts + e] += 1.0f - w_.decay[c];
      const float* row = w_.expert + (static_cast<size_t>(layer_) * s_.experts + e) * s_.state_dim;
      for (int f = 0; f < s_.state_dim; ++f) run[f] += (weight_[k] + 0.5f) * row[f];
    }
  }

  void push_routed(int layer, float scale) {
    const size_t first = features_.size();
    features_.resize(first + s_.experts, 0.0f);
    if (layer < 0) return;
    for (int k = 0; k < s_.top_k; ++k) {
      const size_t i = layer_of(layer) * s_.top_k + k;
      if (state_.experts[i] >= 0) features_[first + state_.experts[i]] += state_.weights[i] * scale;
    }
  }

  void push_token(int back) {
    const int id = state_.ids[b_ * 3 + back];
    for (int j = 0; j < s_.token_dim; ++j)
      features_.push_back(id < 0 ? 0.0f : w_.token[static_cast<size_t>(id) * s_.token_dim + j]);
  }

  /// The blocks of PointFeatures.step, in its order, without the attention's.
  void gather_features() {
    features_.clear();
    const float scale = std::sqrt(static_cast<float>(s_.experts));
    for (int back = 2; back >= 0; --back) push_token(back);
    push_routed(layer_, scale);
    push_routed(layer_ - 1, scale);
    for (int f = 0; f < s_.state_dim; ++f) features_.push_back(run_seen(f));
    const float whole = std::sqrt(static_cast<float>(s_.layers + 1));
    for (int i = 0; i < 2 * s_.state_dim; ++i)
      features_.push_back(2.0f * state_.means[b_ * 2 * s_.state_dim + i] / whole);
    for (int h = 0; h < s_.horizons; ++h) push_routed(column_at(s_, layer_, h) % s_.layers, scale);
    for (int c = 0; c < s_.decays; ++c)
      for (int h = 0; h < s_.horizons; ++h) {
        const size_t target = layer_of(column_at(s_, layer_, h) % s_.layers);
        const float* use = state_.use + (target * s_.decays + c) * s_.experts;
        for (int e = 0; e < s_.experts; ++e) features_.push_back(use[e] * scale);
      }
    if (!s_.hidden) return;
    if (layer_ < 0) {
      features_.resize(features_.size() + 3 * s_.hidden + 1, 0.0f);
      return;
    }
    const float *before = state_.unit + b_ * s_.hidden, *slow = state_.slow + layer_of(layer_) * s_.hidden;
    features_.insert(features_.end(), unit_.begin(), unit_.end());
    for (int d = 0; d < s_.hidden; ++d) features_.push_back(unit_[d] - (layer_ > 0 ? before[d] : 0.0f));
    for (int d = 0; d < s_.hidden; ++d) features_.push_back(2.0f * slow[d]);
    features_.push_back(ln_rms_);
  }

  float run_seen(int f) const {
    return state_.run[b_ * s_.state_dim + f] / std::sqrt(static_cast<float>(layer_ + 2));
  }

  /// Adds its heads' values to the features.
  void attend() {
    const int all = attention_width(s_), width = s_.head_width, columns = pad8(3 * all);
    seen_.clear();
    const int id = state_.ids[b_ * 3];
    for (int j = 0; j < s_.token_dim; ++j)
      seen_.push_back(id < 0 ? 0.0f : w_.token[static_cast<size_t>(id) * s_.token_dim + j]);
    for (int i = 0; i < (s_.hidden ? s_.hidden : s_.state_dim); ++i)
      seen_.push_back(!s_.hidden ? run_seen(i) : layer_ < 0 ? 0.0f : unit_[i]);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int i = 0; i < 3 * all; ++i) sums_[i] = w_.attend_bias[point() * 3 * all + i];
    product(static_cast<const M*>(w_.attend) + point() * attend_size(s_) * columns, columns, seen_.data(),
            attend_size(s_), sums_.data());
    float* memory = state_.memory + (b_ * (s_.layers + 1) + point()) * s_.context * 2 * all;
    const int newest = state_.count[b_] - 1, tokens = smaller(newest + 1, s_.context);
    if (tokens < 1) {  // no token was begun
      features_.resize(features_.size() + all, 0.0f);
      return;
    }
    std::copy(sums_.begin() + all, sums_.begin() + 3 * all, memory + newest % s_.context * 2 * all);
    for (int head = 0; head < s_.heads; ++head) {
      const float penalty = w_.penalty[point() * s_.heads + head], *query = sums_.data() + head * width;
      float largest = -INFINITY, total = 0.0f;
      for (int age = 0; age < tokens; ++age) {
        const float* key = memory + (newest - age) % s_.context * 2 * all + head * width;
        float score = 0.0f;
        for (int j = 0; j < width; ++j) score += query[j] * key[j];
        scores_[age] = score / std::sqrt(static_cast<float>(width)) - penalty * static_cast<float>(age);
        largest = std::max(largest, scores_[age]);
      }
      const size_t first = features_.size();
      features_.resize(first + width, 0.0f);
      for (int age = 0; age < tokens; ++age) {
        const float* value = memory + (newest - age) % s_.context * 2 * all + all + head * width;
        const float share = std::exp(scores_[age] - largest);
        total += share;
        for (int j = 0; j < width; ++j) features_[first + j] += share * value[j];
      }
      for (int j = 0; j < width; ++j) features_[first + j] /= total;
    }
  }

  void add_mlp() {
    gather_features();
    if (s_.heads) attend();
    const int W = s_.width, padded = pad8(W), X = s_.horizons * s_.experts;
    const size_t P = static_cast<size_t>(s_.layers) + 1, size = static_cast<size_t>(feature_layout(s_).size);
    const auto activate = [&](const M* matrix, const float* bias, const float* x, int inputs) {
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int u = 0; u < W; ++u) sums_[u] = bias[u];
      product(matrix, padded, x, inputs, sums_.data());
      for (int u = 0; u < W; ++u) sums_[u] = gelu(sums_[u]);
    };
    activate(static_cast<const M*>(w_.first) + point() * size * padded, w_.first_bias + point() * W,
             features_.data(), static_cast<int>(size));
    for (int u = 0; u < W; ++u) values_[u] = w_.gate_bias[point() * W + u];
    const float scale = std::sqrt(static_cast<float>(s_.experts));
    for (int k = 0; k < (layer_ < 0 ? 0 : s_.top_k); ++k) {
      if (expert_[k] < 0) continue;
      const float* row = w_.gate + (point() * s_.experts + expert_[k]) * W;
      for (int u = 0; u < W; ++u) values_[u] += weight_[k] * scale * row[u];
    }
    for (int u = 0; u < W; ++u) values_[u] *= sums_[u];
    for (int i = 0; i < s_.depth - 1; ++i) {
      activate(static_cast<const M*>(w_.more) + (i * P + point()) * W * padded,
               w_.more_bias + (i * P + point()) * W, values_.data(), W);
      for (int u = 0; u < W; ++u) values_[u] += sums_[u];
    }
    for (int i = 0; i < X; ++i) logits_[i] = w_.last_bias[point() * X + i];
    product(static_cast<const M*>(w_.last) + point() * W * pad8(X), pad8(X), values_.data(), W,
            logits_.data());
  }

  /// The target layer's router on today's hidden state, centred between the K-th largest score and the next.
  void add_router(int h, float* logits) {
    const int E = s_.experts, columns = pad8(E), target = layer_ + 1 + h;
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    product(static_cast<const M*>(w_.router) + static_cast<size_t>(target) * s_.hidden * columns, columns,
            hidden_.data(), s_.hidden, sums_.data());
    for (int e = 0; e < E; ++e) {
      const int place = target * E + e;
      sums_[e] = sums_[e] * router_norm_ + w_.router_bias[place];
      if (w_.corrected[target]) sums_[e] = sigmoid(sums_[e]) + w_.correction[place];
    }
    float middle = 0.0f;
    if (s_.top_k > 1 && s_.top_k < E) {
      std::copy(sums_.begin(), sums_.begin() + E, scores_.begin());
      const auto kth = scores_.begin() + (s_.top_k - 1);
      std::nth_element(scores_.begin(), kth, scores_.begin() + E, std::greater<float>());
      middle = 0.5f * (*kth + *std::max_element(kth + 1, scores_.begin() + E));
    }
    const float trust = w_.trust[point() * s_.horizons + h];
    for (int e = 0; e < E; ++e) logits[e] += trust * (sums_[e] - middle);
  }

  void add_table(int h, float* logits) {
    const int id = state_.ids[b_ * 3], place = w_.column[column_at(s_, layer_, h)];
    int row = id;
    if (w_.row) row = id < 0 || w_.row[id] < 0 ? s_.table_rows - 1 : w_.row[id];
    if (row < 0 || place < 0) return;
    const size_t first = (static_cast<size_t>(row) * s_.table_columns + place) * s_.experts;
    for (int e = 0; e < s_.experts; ++e) logits[e] += value_of(static_cast<const M*>(w_.table)[first + e]);
  }

  /// The link, and what it leaves of "no sequence needs it".
  void merge(int h, float* logits) {
    const int E = s_.experts;
    const size_t cell = (point() * s_.horizons + h) * s_.scale_experts;
    float largest = -INFINITY, total = 0.0f;
    for (int e = 0; e < E; ++e) {
      const size_t fitted = cell + (s_.scale_experts > 1 ? e : 0);
      logits[e] = logits[e] * w_.scale[fitted] + w_.offset[fitted];
      largest = std::max(largest, logits[e]);
    }
    for (int e = 0; e < E && s_.softmax; ++e) total += logits[e] = std::exp(logits[e] - largest);
    for (int e = 0; e < E; ++e) {
      const float p = s_.softmax ? logits[e] / total : sigmoid(logits[e]);
      if (p > 0.0f) missed_[h * E + e] *= 1.0f - p;
    }
  }

  void remember_hidden() {
    float *before = state_.unit + b_ * s_.hidden, *slow = state_.slow + layer_of(layer_) * s_.hidden;
    for (int d = 0; d < s_.hidden; ++d) {
      slow[d] = s_.slow * slow[d] + (1.0f - s_.slow) * unit_[d];
      before[d] = unit_[d];
    }
  }

  void publish(int ignored) {
    const RingView& ring = ring_->view();
    unsigned char* slot = ring.memory + ++sequence_ % ring.slots * ring.stride;
    const auto store = [](unsigned char* at, uint64_t word) {
      std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(at)).store(word, std::memory_order_release);
    };
    store(slot, 0);
    uint32_t found = 0;
    for (int i = 0; i < rows_ * s_.experts; ++i) {
      const float p = 1.0f - missed_[i];
      const int h = i / s_.experts;
      if (!(p >= w_.threshold[point() * s_.horizons + h])) continue;
      const ForecastEntry entry{column_at(s_, layer_, h) % s_.layers, i % s_.experts, p, h + 1};
      uint64_t words[2];
      std::memcpy(words, &entry, sizeof(words));
      unsigned char* at = slot + sizeof(ForecastSlot) + sizeof(ForecastEntry) * found++;
      store(at, words[0]);
      store(at + sizeof(uint64_t), words[1]);
    }
    store(slot + offsetof(ForecastSlot, about), static_cast<uint32_t>(layer_) | static_cast<uint64_t>(found)
                                                                                    << 32);
    store(slot + offsetof(ForecastSlot, ignored), static_cast<uint64_t>(ignored));
    store(slot, sequence_);
  }

  const SpeculationSizes s_;
  const SpeculationWeights w_;
  const SpeculationState state_;
  const SpeculationModel model_;
  MatrixProduct<M> product;
  SpeculationInput in_;
  int layer_ = -1, rows_ = 0, within_ = 0;
  size_t b_ = 0;
  float router_norm_ = 0.0f, ln_rms_ = 0.0f;
  std::vector<float> features_, seen_, hidden_, unit_, sums_, values_, logits_, missed_, scores_, weight_;
  std::vector<int> expert_;
  uint64_t sequence_ = 0;
};

}  // namespace

std::unique_ptr<Speculation> make_speculation_cpu(const SpeculationModel& model, int slots) {
  check_model(model);
  if (model.sizes.bf16) return std::make_unique<CpuSpeculation<uint16_t>>(model, slots);
  return std::make_unique<CpuSpeculation<float>>(model, slots);
}

}  // namespace specgate
