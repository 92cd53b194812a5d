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

EACH_ELEMENT(exp_float32, float, exp_shifted)
EACH_ELEMENT(exp_float64, double, exp_shifted)
EACH_ELEMENT(log_float64, double, log_positive)
EACH_ELEMENT(log_of_float32, float, log_of)
EACH_ELEMENT(log_of_float64, double, log_of)
EACH_ELEMENT(tanh_of_float32, float, tanh_of)
EACH_ELEMENT(tanh_of_float64, double, tanh_of)
EACH_ELEMENT(normal_float32, float, normal_below)
EACH_ELEMENT(normal_float64, double, normal_below)
EACH_ELEMENT(subnormal_float32, float, subnormal_below)
EACH_ELEMENT(subnormal_float64, double, subnormal_below)
EACH_ELEMENT(erf_float32, float, erf_of)
EACH_ELEMENT(erf_float64, double, erf_of)
EACH_ELEMENT(expm1_of_float32, float, expm1_of)
EACH_ELEMENT(expm1_of_float64, double, expm1_of)
EACH_ELEMENT(sine_float32, float, sine_of<0>)
EACH_ELEMENT(sine_float64, double, sine_of<0>)
EACH_ELEMENT(cosine_float32, float, sine_of<1>)
EACH_ELEMENT(cosine_float64, double, sine_of<1>)
EACH_ELEMENT(power_float32, float, [](float base) { return pow_of(base, 0.7f); })
EACH_ELEMENT(steep_power_float32, float, [](float base) { return pow_of(base, -12.3f); })
EACH_ELEMENT(log1p_of_float32, float, log1p_of)
EACH_ELEMENT(log1p_of_float64, double, log1p_of)
EACH_ELEMENT(exp_of_float32, float, exp_of)
EACH_ELEMENT(exp_of_float64, double, exp_of)
EACH_ELEMENT(softplus_float32, float, softplus)
EACH_ELEMENT(softplus_float64, double, softplus)
EACH_ELEMENT(sigmoid_float32, float, sigmoid)
EACH_ELEMENT(sigmoid_float64, double, sigmoid)
EACH_ELEMENT(sigmoid_beside_softplus_float32, float, sigmoid_beside_softplus)
EACH_ELEMENT(sigmoid_beside_softplus_float64, double, sigmoid_beside_softplus)
EACH_PIECE(exponentials_float32, float, float, exponentials_of)
EACH_PIECE(third_of_exponentials_float32, float, float, third_of_exponentials)
EACH_PIECE(load_bfloat16, bfloat16, float, load)
EACH_PIECE(load_float16, float16, float, load)
EACH_PIECE(store_bfloat16, float, bfloat16, store)
EACH_PIECE(store_float16, float, float16, store)
EACH_PIECE(scaled_bfloat16, float, bfloat16, (scaled_by<bfloat16, kOne>))
EACH_PIECE(scaled_float16, float, float16, (scaled_by<float16, kOne>))
EACH_PIECE(times_nan_bfloat16, float, bfloat16, (scaled_by<bfloat16, kNaN>))
EACH_PIECE(times_nan_float16, float, float16, (scaled_by<float16, kNaN>))
