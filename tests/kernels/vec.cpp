// Applies each function of csrc/vec.h to n elements, `piece` of them at a time, for test_vec.py.
// All at once, they fill vectors; one at a time, they run the code for the rest of a vector.
#include <algorithm>

#include "exponentials.h"
#include "vec.h"

using namespace pyfused;

#define EACH_PIECE(name, From, To, body)                                                           \
  extern "C" __attribute__((visibility("default"))) void name(const From* from, To* to, int64_t n, \
                                                              int64_t piece) {                     \
    for (int64_t first = 0; first < n; first += piece) {                                           \
      body(from + first, to + first, std::min(piece, n - first));                                  \
    }                                                                                              \
  }

#define EACH_ELEMENT(name, T, function)                                                      \
  EACH_PIECE(name, T, T, [](const T* PYFUSED_RESTRICT x, T* PYFUSED_RESTRICT y, int64_t n) { \
    PYFUSED_SIMD()                                                                           \
    for (int64_t i = 0; i < n; ++i) y[i] = function(x[i]);                                   \
  })

// exponentials() requires as many elements as fill two vectors.
void exponentials_of(const float* x, float* y, int64_t n) {
  constexpr int64_t kWhole = 2 * kLanes<float>;
  const float pivot[kWhole] = {};
  for (int64_t i = 0; i < n; i += kWhole) {
    float whole[kWhole] = {};
    const int64_t count = std::min(kWhole, n - i);
    std::copy_n(x + i, count, whole);
    exponentials(whole, pivot, whole, kWhole);
    std::copy_n(whole, count, y + i);
  }
}

template <class Half, uint32_t factor> void scaled_by(const float* x, Half* y, int64_t n) {
  constexpr int64_t kBuffer = 1024;
  float buffer[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    scaled(x + i, bit_cast<float>(factor), buffer, y + i, std::min(kBuffer, n - i));
  }
}
template <class A> A normal_below(A x) { return Normal<A>(x).below; }
template <class A> A subnormal_below(A x) { return Normal<A, true>(x).below; }
constexpr float kThird = 0.333333333f;
template <class T> void third_of_exponentials(const float* x, T* y, int64_t n) {
  constexpr int64_t kBuffer = 1024;
  float buffer[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t count = std::min(kBuffer, n - i);
    scaled_exponentials(x + i, 0.0f, kThird, buffer, y + i, count, false);
  }
}
constexpr uint32_t kOne = 0x3f800000,
                   kNaN = 0x7fffffff;  // the NaN that rounding would carry out of

#define EACH_FLOAT(name, function)              \
  EACH_ELEMENT(name##_float32, float, function) \
  EACH_ELEMENT(name##_float64, double, function)

EACH_FLOAT(exp, exp_shifted)
EACH_FLOAT(exp_of, exp_of)
EACH_FLOAT(log_of, log_of)
EACH_FLOAT(log1p_of, log1p_of)
EACH_FLOAT(tanh_of, tanh_of)
EACH_FLOAT(normal, normal_below)
EACH_FLOAT(subnormal, subnormal_below)
EACH_FLOAT(erf, erf_of)
EACH_FLOAT(expm1_of, expm1_of)
EACH_FLOAT(sine, sine_of<0>)
EACH_FLOAT(cosine, sine_of<1>)
EACH_FLOAT(softplus, softplus)
EACH_FLOAT(sigmoid, sigmoid)
EACH_FLOAT(sigmoid_beside_softplus, sigmoid_beside_softplus)
EACH_ELEMENT(log_float64, double, log_positive)
EACH_ELEMENT(power_float32, float, [](float base) { return pow_of(base, 0.7f); })
EACH_ELEMENT(steep_power_float32, float, [](float base) { return pow_of(base, -12.3f); })
EACH_PIECE(exponentials_float32, float, float, exponentials_of)
EACH_PIECE(third_of_exponentials_float32, float, float, third_of_exponentials)

#define EACH_HALF(Half)                                           \
  EACH_PIECE(load_##Half, Half, float, load)                      \
  EACH_PIECE(store_##Half, float, Half, store)                    \
  EACH_PIECE(scaled_##Half, float, Half, (scaled_by<Half, kOne>)) \
  EACH_PIECE(times_nan_##Half, float, Half, (scaled_by<Half, kNaN>))

EACH_HALF(bfloat16)
EACH_HALF(float16)
