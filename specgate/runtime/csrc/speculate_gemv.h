// out += x @ matrix on the CPU, for matrices in float32 or bfloat16 that lie row by row over their inputs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "floats.h"

namespace specgate {

inline float value_of(float x) { return x; }
inline float value_of(uint16_t bf16) { return float_of_bf16(bf16); }

/// out[n] += x[0] * rows[0][n] + ... + x[3] * rows[3][n]. Elementwise: every instruction set gives the same
/// bits.
template <class M>
[[gnu::always_inline]] inline void add_four_loop(const M* const* rows, const float* x, int columns,
                                                 float* __restrict__ out) {
  const M *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const float xa = x[0], xb = x[1], xc = x[2], xd = x[3];
  for (int n = 0; n < columns; ++n)
    out[n] += (xa * value_of(a[n]) + xb * value_of(b[n])) + (xc * value_of(c[n]) + xd * value_of(d[n]));
}

template <class M>
void add_four_plain(const M* const* rows, const float* x, int columns, float* out) {
  add_four_loop(rows, x, columns, out);
}

#if defined(__x86_64__)
template <class M>
[[gnu::target("avx2")]] void add_four_avx2(const M* const* rows, const float* x, int columns, float* out) {
  add_four_loop(rows, x, columns, out);
}
#endif

/// Chooses the instruction set once, when it is made.
template <class M>
class MatrixProduct {
 public:
  MatrixProduct() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) add_four_ = &add_four_avx2<M>;
#endif
  }

  /// out[n] += sum over k of x[k] * matrix[k * columns + n]; rows of inputs that are zero are not read.
  void operator()(const M* matrix, int columns, const float* x, int inputs, float* out) const {
    const M* rows[4];
    float of[4];
    int held = 0;
    for (int k = 0; k < inputs; ++k) {
      if (x[k] == 0.0f) continue;
      rows[held] = matrix + static_cast<size_t>(k) * columns;
      of[held++] = x[k];
      if (held < 4) continue;
      add_four_(rows, of, columns, out);
      held = 0;
    }
    for (int i = 0; i < held; ++i)
      for (int n = 0; n < columns; ++n) out[n] += of[i] * value_of(rows[i][n]);
  }

 private:
  void (*add_four_)(const M* const*, const float*, int, float*) = &add_four_plain<M>;
};

}  // namespace specgate
