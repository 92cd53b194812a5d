// csrc/vec.h as test_vec.py sees it: each function over n elements, `piece` of them at a time. All at
// once they fill vectors; one at a time they take what the loop and its intrinsics leave over.
#include <algorithm>

#include "exponentials.h"
#include "vec.h"

using namespace pyfused;

#define EACH_PIECE(name, From, To, body)                                                     \
  extern "C" __attribute__((visibility("default"))) void name(const From* from, To* to,      \
                                                              int64_t n, int64_t piece) {    \
    for (int64_t first = 0; first < n; first += piece) {                                     \
      body(from + first, to + first, std::min(piece, n - first));                            \
    }                                                                                        \
  }

#define EACH_ELEMENT(name, T, function)                                                      \
  EACH_PIECE(name, T, T, [](const T* PYFUSED_RESTRICT x, T* PYFUSED_RESTRICT y, int64_t n) { \
    PYFUSED_SIMD()                                                                           \
    for (int64_t i = 0; i < n; ++i) y[i] = function(x[i]);                                   \
  })

// exponentials.h takes whole vectors only.
void exponentials_of(const float* x, float* y, int64_t n) {
  constexpr int64_t kVector = kLanes<float>;
  const float pivot[kVector] = {};
  for (int64_t i = 0; i < n; i += kVector) {
    float vector[kVector] = {};
    const int64_t count = std::min(kVector, n - i);
    std::copy_n(x + i, count, vector);
    exponentials(vector, pivot, vector, kVector);
    std::copy_n(vector, count, y + i);
  }
}

EACH_ELEMENT(exp_float32, float, exp_nonpositive)
EACH_ELEMENT(exp_float64, double, exp_nonpositive)
EACH_ELEMENT(log_float32, float, log_positive)
EACH_ELEMENT(log_float64, double, log_positive)
EACH_PIECE(exponentials_float32, float, float, exponentials_of)
EACH_PIECE(load_bfloat16, bfloat16, float, load)
EACH_PIECE(load_float16, float16, float, load)
EACH_PIECE(store_bfloat16, float, bfloat16, store)
EACH_PIECE(store_float16, float, float16, store)
