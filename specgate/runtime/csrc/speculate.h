// Which experts will be needed: from what is known at one MoE layer to a list of (layer, expert, p), in one
// launch.
//
// Letters: B sequences, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K experts per
// token, D hidden size, F features, W units, C decay rates, S running state, A attention heads, T tokens
// looked back on, V ids, R rows of the id table, X = H * E. A matrix lies row by row over its inputs,
// [inputs, outputs], and its rows are padded with zeros to a multiple of 8 outputs, so that 16-byte loads are
// aligned: pad8.
//
// What is computed is step_logits + calibrator of the predictors router_lookahead, router_residual and mlp
// (specgate/predictors), merged over the sequences: p = 1 - prod(1 - p_b). Everything an earlier token left
// behind lies in the small buffers of SpeculationState, which a launch reads and brings up to date. So while
// decoding it has to be launched once at every source point, in order: layer -1 with the token's id, then
// layers 0 to L - 1.
//
// This header is C++17: device code includes it too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace specgate {

enum class Scalar : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

struct SpeculationSizes {
  int32_t layers = 0, experts = 0, top_k = 0, horizons = 0;
  int32_t batch = 1;    ///< most sequences of a launch
  int32_t vocab = 0;    ///< ids beyond are taken for unknown
  int32_t hidden = 0;   ///< D; 0: no hidden states
  int32_t routers = 0;  ///< 1: the target layers' routers speak where the target lies within the token
  int32_t width = 0;    ///< W; 0: no MLP
  int32_t depth = 0;    ///< hidden layers of the MLP
  int32_t token_dim = 0, state_dim = 0, decays = 0;
  int32_t heads = 0, head_width = 0;
  int32_t context = 0;  ///< T: older tokens are forgotten by the attention
  int32_t table_rows = 0, table_columns = 0;
  int32_t scale_experts = 1;  ///< 1 or E: whether the calibrator tells experts apart
  int32_t softmax = 0;        ///< 1: one expert per token; 0: a sigmoid per expert
  int32_t wraps = 1;          ///< 1 while decoding: after the last layer comes the first of the next token
  int32_t bf16 = 0;           ///< the matrices and the table are bfloat16, else float32
  float router_eps = 1e-6f, unit_eps = 1e-6f;
  float slow = 0.8f, mean_0 = 0.5f, mean_1 = 0.9f;  ///< rates of decayed means: hidden state, running state
};

/// "M": float32 or bfloat16 (SpeculationSizes::bf16). Null where the sizes say that a part is missing.
struct SpeculationWeights {
  const void* router = nullptr;        ///< [L, D, pad8(E)] M, norm weights included
  const float* router_bias = nullptr;  ///< [L, E]
  const float* correction = nullptr;   ///< [L, E], added to the sigmoid of the scores of ...
  const uint8_t* corrected = nullptr;  ///< [L] ... layers where this is 1
  const float* trust = nullptr;        ///< [P, H] factor on the routers' centred scores
  const void* first = nullptr;         ///< [P, F, pad8(W)] M
  const float* first_bias = nullptr;   ///< [P, W]
  const float* gate = nullptr;         ///< [P, E, W]
  const float* gate_bias = nullptr;    ///< [P, W]
  const void* more = nullptr;          ///< [depth - 1, P, W, pad8(W)] M
  const float* more_bias = nullptr;    ///< [depth - 1, P, W]
  const void* last = nullptr;          ///< [P, W, pad8(X)] M
  const float* last_bias = nullptr;    ///< [P, X]
  const void* attend = nullptr;  ///< [P, token_dim + (D or S), pad8(3 A head_width)] M: query, key, value
  const float* attend_bias = nullptr;  ///< [P, 3 A head_width]
  const float* penalty = nullptr;      ///< [P, A] taken from a score for each token of distance
  const float* token = nullptr;        ///< [V, token_dim], gain included
  const float* expert = nullptr;       ///< [L, E, S]
  const float* start = nullptr;        ///< [S, token_dim]
  const float* decay = nullptr;        ///< [C]
  const void* table = nullptr;         ///< [R, table_columns, E] M: logits added where `column` names one
  const int32_t* row = nullptr;        ///< [V] row of an id, -1: the last one; null: the id is the row
  const int32_t* column = nullptr;     ///< [2 L] column of the table for a target, -1: none
  const float* scale = nullptr;        ///< [P, H, scale_experts]: link(logit * scale + offset)
  const float* offset = nullptr;       ///< [P, H, scale_experts]
  const float* threshold = nullptr;    ///< [P, H]: p below is not reported; may change between launches
};

/// What earlier tokens left behind. Fresh: ids and experts -1, live 1, the rest 0.
struct SpeculationState {
  int32_t* ids = nullptr;      ///< [B, 3] the current token's, the one before, the one before that; -1: none
  int32_t* count = nullptr;    ///< [B] tokens begun
  uint8_t* live = nullptr;     ///< [B] 0: the sequence has ended and needs nothing
  int32_t* experts = nullptr;  ///< [B, L, K] of the token that passed the layer last; -1: none
  float* weights = nullptr;    ///< [B, L, K]
  float* use = nullptr;        ///< [B, L, C, E] decayed use
  float* run = nullptr;        ///< [B, S] the current token's embedding plus those of its experts so far
  float* means = nullptr;      ///< [B, 2, S] decayed means of the tokens before
  float* unit = nullptr;       ///< [B, D] normalised hidden state of the layer before
  float* slow = nullptr;    ///< [B, L, D] decayed mean of the normalised hidden states of the tokens before
  float* memory = nullptr;  ///< [B, P, T, 2 A head_width] keys and values, token n at n mod T
};

struct SpeculationModel {
  SpeculationSizes sizes;
  SpeculationWeights weights;
  SpeculationState state;
};

/// What is new at one source point. Pointers are of the device, dense.
struct SpeculationInput {
  int32_t layer = -1;            ///< the last MoE layer whose router input exists
  int32_t batch = 1;             ///< B, rows 0 to B - 1 of the state
  const void* hidden = nullptr;  ///< [B, D] the residual stream that enters the layer's norm
  Scalar hidden_type = Scalar::F32;
  const void* experts = nullptr;  ///< [B, K] that the layer's router chose (MLP only)
  int32_t experts_bytes = 8;      ///< of an index: 4 or 8
  const void* weights = nullptr;  ///< [B, K] its weights, 0 where the expert did not run (MLP only)
  Scalar weights_type = Scalar::F32;
  const void* ids = nullptr;  ///< [B], at layer -1
  int32_t ids_bytes = 8;
};

// ---- Output: a ring of forecasts in memory that the device writes and any host thread reads
// --------------------

struct ForecastEntry {
  int32_t layer, expert;  ///< MoE layer, counted over MoE layers only
  float p;                ///< that any of the sequences uses it
  int32_t ahead;          ///< MoE layers from the source point: 1 is the next
};

struct Foreseen {
  uint64_t sequence = 0;  ///< counts launches from 1
  int32_t source_layer = -1;
  int32_t ignored = 0;                 ///< rows that were left out because their hidden state was not finite
  std::vector<ForecastEntry> entries;  ///< nearest layer first, then by expert
};

/// One place of the ring. Words are written by relaxed and read by acquire operations, `sequence` is released
/// last.
struct alignas(64) ForecastSlot {
  uint64_t sequence;  ///< 0 while it is being written
  uint64_t about;     ///< source layer (low half) and number of entries
  uint64_t ignored;
  uint64_t unused[5];
  // entries follow, two words each
};

struct RingView {
  unsigned char* memory = nullptr;
  int32_t slots = 0;
  int32_t capacity = 0;  ///< entries of a slot
  size_t stride = 0;     ///< bytes of a slot
};

/// The memory of a ring: what one launch after the other writes, slot by slot, without ever waiting for a
/// reader.
class ForecastRing {
 public:
  /// `allocate`d memory is freed by `free` (pinned, mapped memory for a CUDA device); null: plain memory.
  ForecastRing(int slots, int capacity, void* (*allocate)(size_t) = nullptr, void (*free)(void*) = nullptr);
  ~ForecastRing();
  ForecastRing(const ForecastRing&) = delete;
  ForecastRing& operator=(const ForecastRing&) = delete;
  const RingView& view() const { return view_; }
  /// The newest launch whose forecast is there, if `known` is one that was.
  uint64_t newest(uint64_t known) const;

 private:
  RingView view_;
  void (*free_)(void*);
};

/// One reader's place in a ring: each thread that polls has its own. A poll that finds nothing is one load.
class ForecastReader {
 public:
  explicit ForecastReader(std::shared_ptr<const ForecastRing> ring) : ring_(std::move(ring)) {}
  /// The oldest forecast not seen yet; false if there is none. Forecasts that were overwritten first are
  /// `lost`.
  bool poll(Foreseen& out);
  /// The same, skipping to the newest.
  bool poll_newest(Foreseen& out);
  uint64_t lost() const { return lost_; }

 private:
  std::shared_ptr<const ForecastRing> ring_;
  uint64_t next_ = 1, lost_ = 0;
};

// ---- The computation
// ---------------------------------------------------------------------------------------------

/// Runs a model on one device. Weights and state belong to the caller and stay where they are.
class Speculation {
 public:
  virtual ~Speculation() = default;
  /// CUDA: enqueues on `stream` and returns; may be captured into a graph. Launches of one object must not
  /// overlap: use one stream, or order streams by events. Throws StoreFailure(Config) for an input that does
  /// not fit.
  virtual void launch(const SpeculationInput& input, uintptr_t stream) = 0;
  const std::shared_ptr<ForecastRing>& ring() const { return ring_; }

 protected:
  explicit Speculation(std::shared_ptr<ForecastRing> ring) : ring_(std::move(ring)) {}
  std::shared_ptr<ForecastRing> ring_;
};

/// Throws StoreFailure(Config) for sizes that make no sense or weights that are missing.
std::unique_ptr<Speculation> make_speculation_cpu(const SpeculationModel& model, int slots);
/// The device's kernel, block after block on the CPU: for tests. `order` turns blocks and threads about.
std::unique_ptr<Speculation> make_speculation_emulated(const SpeculationModel& model, int slots, int order);
#ifdef SPECGATE_CUDA
/// `blocks`: at most so many thread blocks, 0: what fits the device.
std::unique_ptr<Speculation> make_speculation_cuda(const SpeculationModel& model, int slots, int device,
                                                   int blocks);
#endif

/// Throws StoreFailure(Config), naming what is wrong.
void check_model(const SpeculationModel& model);
void check_input(const SpeculationModel& model, const SpeculationInput& input);

}  // namespace specgate
