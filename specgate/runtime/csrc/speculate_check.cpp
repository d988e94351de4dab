#include <string>

#include "error.h"
#include "speculate_layout.h"

namespace specgate {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw StoreFailure(StoreFailure::Kind::Config, what); }

void within(const char* name, int value, int least, int most) {
  if (value >= least && value <= most) return;
  refuse("speculation with " + std::string(name) + "=" + std::to_string(value) + " is outside " +
         std::to_string(least) + ".." + std::to_string(most) + ": take the sizes from the predictor");
}

void given(const char* name, const void* pointer, bool needed) {
  if (needed && !pointer)
    refuse("speculation lacks the tensor '" + std::string(name) + "': take the tensors from the predictor");
}

}  // namespace

void check_model(const SpeculationModel& model) {
  const SpeculationSizes& s = model.sizes;
  const SpeculationWeights& w = model.weights;
  const SpeculationState& state = model.state;
  within("layers", s.layers, 1, 4096);
  within("experts", s.experts, 1, 4096);
  within("top_k", s.top_k, 1, smaller(s.experts, 256));
  within("horizons", s.horizons, 1, 2 * s.layers);
  within("horizons * experts", s.horizons * s.experts, 1, 8192);
  within("batch", s.batch, 1, 4096);
  within("vocab", s.vocab, 1, 1 << 30);
  within("hidden", s.hidden, s.routers ? 1 : 0, 1 << 16);
  within("width", s.width, 0, 1 << 14);
  within("scale_experts", s.scale_experts, 1, s.experts);
  if (s.scale_experts != 1) within("scale_experts", s.scale_experts, s.experts, s.experts);
  if (s.width) {
    within("depth", s.depth, 1, 8);
    within("token_dim", s.token_dim, 1, 4096);
    within("state_dim", s.state_dim, 1, 4096);
    within("decays", s.decays, 0, 64);
    within("heads", s.heads, 0, 64);
    if (s.heads) within("head_width", s.head_width, 1, 128);
    if (s.heads) within("heads * head_width", s.heads * s.head_width, 1, 256);
    if (s.heads) within("context", s.context, 1, 1 << 20);
  }
  const bool mlp = s.width > 0, table = s.table_rows > 0;
  if (table) within("table_columns", s.table_columns, 1, 2 * s.layers);
  given("router", w.router, s.routers);
  given("router_bias", w.router_bias, s.routers);
  given("correction", w.correction, s.routers);
  given("corrected", w.corrected, s.routers);
  given("trust", w.trust, s.routers);
  given("first", w.first, mlp);
  given("first_bias", w.first_bias, mlp);
  given("gate", w.gate, mlp);
  given("gate_bias", w.gate_bias, mlp);
  given("more", w.more, mlp && s.depth > 1);
  given("more_bias", w.more_bias, mlp && s.depth > 1);
  given("last", w.last, mlp);
  given("last_bias", w.last_bias, mlp);
  given("attend", w.attend, mlp && s.heads);
  given("attend_bias", w.attend_bias, mlp && s.heads);
  given("penalty", w.penalty, mlp && s.heads);
  given("token", w.token, mlp);
  given("expert", w.expert, mlp);
  given("start", w.start, mlp);
  given("decay", w.decay, mlp && s.decays);
  given("table", w.table, table);
  given("column", w.column, table);
  given("scale", w.scale, true);
  given("offset", w.offset, true);
  given("threshold", w.threshold, true);
  given("ids", state.ids, true);
  given("count", state.count, true);
  given("live", state.live, true);
  given("experts", state.experts, mlp);
  given("weights", state.weights, mlp);
  given("use", state.use, mlp && s.decays);
  given("run", state.run, mlp);
  given("means", state.means, mlp);
  given("unit", state.unit, mlp && s.hidden);
  given("slow", state.slow, mlp && s.hidden);
  given("memory", state.memory, mlp && s.heads);
}

void check_input(const SpeculationModel& model, const SpeculationInput& input) {
  const SpeculationSizes& s = model.sizes;
  within("layer", input.layer, -1, s.layers - 1);
  within("batch", input.batch, 1, s.batch);
  const bool routed = input.layer >= 0;
  given("hidden", input.hidden, routed && s.hidden);
  given("experts", input.experts, routed && s.width);
  given("weights", input.weights, routed && s.width);
  given("token_ids", input.ids, !routed);
}

}  // namespace specgate
