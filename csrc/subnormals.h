// Probabilities exp(x - pivot) factor, some of which are subnormal, for the results of softmax.
//
// Operations on subnormal numbers take a hundred cycles on many processors, and are flushed to 0 in
// these kernels. The bits of a subnormal number are an integer, which is computed where a result
// has been flushed.
#pragma once

#include <cmath>
#include <limits>

#include "exponentials.h"

namespace pyfused {

// exp(x) factor is 0 below, for a factor of at most 1.
template <class A> constexpr A kUnderflow = kIsFloat<A> ? A(-104) : A(-746);
// Results below are inexact: the product of exp_shifted is subnormal unless it is fused.
#ifdef __FMA__
template <class A> constexpr A kExact = std::numeric_limits<A>::min();
#else
template <class A> constexpr A kExact = kIsFloat<A> ? A(0x1p-102) : A(0x1p-968);
#endif

// exp(x) factor, which may be subnormal.
template <class A> A small_probability(double x, double factor) {
  constexpr int kMantissa = kIsFloat<A> ? 23 : 52, kLift = kBias<A> - 1 + kMantissa;
  // In units of the smallest subnormal number; kLift log(2) in two parts, the first without error.
  const double units =
      std::exp(x + kLift * 0.69314718036912382) * std::exp(kLift * 1.9082149292705877e-10) * factor;
  if (units >= double(Bits<A>(1) << kMantissa)) return A(std::exp(x) * factor);
  return bit_cast<A>(Bits<A>(std::nearbyint(units)));
}

// Recomputes results y = exp(x) factor that are inexact.
template <class A, class Exponent, class Factor>
void add_subnormals(A* y, int64_t n, const Exponent& x, const Factor& factor) {
  const auto is_inexact = [&](int64_t i) { return y[i] < kExact<A> && x(i) > kUnderflow<A>; };
  A found = 0;
  PYFUSED_SIMD(reduction(+ : found))
  for (int64_t i = 0; i < n; ++i) found += is_inexact(i) ? A(1) : A(0);
  for (int64_t i = 0; found > 0 && i < n; ++i) {
    if (is_inexact(i)) y[i] = small_probability<A>(x(i), factor(i));
  }
}

template <class U, class A, class T>
void probabilities(const U* x, A pivot, A factor, A* buffer, T* out, int64_t n,
                   bool /* streams */) {
  A* const wide = staged(out, buffer);
  scaled_exponentials(x, pivot, factor, buffer, wide, n, false);
  add_subnormals(
      wide, n, [=](int64_t i) { return widen(x[i]) - pivot; }, [=](int64_t) { return factor; });
  store(wide, out, n);
}

// The same, from e with e rescale = exp(x - pivot) factor.
template <class A, class U, class T>
void probabilities_of_kept(const A* e, A rescale, const U* x, A pivot, A factor, A* buffer, T* out,
                           int64_t n) {
  A* const wide = staged(out, buffer);
  scaled(e, rescale, buffer, wide, n);
  add_subnormals(
      wide, n, [=](int64_t i) { return widen(x[i]) - pivot; }, [=](int64_t) { return factor; });
  store(wide, out, n);
}

// Recomputes results of columns y = exp(x - pivot) factor, with a pivot and a factor for each.
template <class T, class A>
void add_subnormals_of_columns(const A* x, const A* pivot, const A* factor, A* y, int64_t n) {
  add_subnormals(
      y, n, [=](int64_t b) { return x[b] - pivot[b]; }, [=](int64_t b) { return factor[b]; });
}

#ifdef PYFUSED_HAS_REGISTERS
#ifdef __AVX512F__
PYFUSED_INLINE bool any_zero(__m512 x) {
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ) != 0;
}
PYFUSED_INLINE __m512 smaller(__m512 x, __m512 y) { return _mm512_min_ps(x, y); }
// x, and where it is 0 the subnormal number 2^-149 round(y), 0 <= y <= 2^23.
PYFUSED_INLINE __m512 or_subnormal(__m512 x, __m512 y) {
  const __mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_castsi512_ps(_mm512_mask_cvtps_epi32(_mm512_castps_si512(x), zero, y));
}
#else
PYFUSED_INLINE bool any_zero(__m256 x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ)) != 0;
}
PYFUSED_INLINE __m256 smaller(__m256 x, __m256 y) { return _mm256_min_ps(x, y); }
PYFUSED_INLINE __m256 or_subnormal(__m256 x, __m256 y) {
  const __m256 zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_cvtps_epi32(y)), zero);
}
#endif
// The lanes after the end of a row may be negative.
PYFUSED_INLINE bool any_zero(Pair x) { return any_zero(x.low) || any_zero(x.high); }
PYFUSED_INLINE bool any_zero(Quad x) {
  return any_zero(smaller(smaller(x.low.low, x.low.high), smaller(x.high.low, x.high.high)));
}
template <int N> PYFUSED_INLINE Registers<N> or_subnormal(Registers<N> x, Registers<N> y) {
  return {or_subnormal(x.low, y.low), or_subnormal(x.high, y.high)};
}

// y = exp(x) factor, with subnormal numbers where y is 0. They are 0 in float16.
template <class T, class V, class F> PYFUSED_INLINE V with_subnormals(V y, V x, F factor) {
  if (std::is_same_v<T, float16> || !any_zero(y)) return y;
  if (!any_zero(maximum(y, x * -1.0f + kUnderflow<float>))) return y;  // masked elements
  const V n = round_to_int(x * kLog2E);
  const V r = x - n * 0.693147182f;
  V p;
  if constexpr (std::is_same_v<F, float>) p = polynomial(kExp, r, factor);
  else p = polynomial(kExp, r, 1.0f) * factor;
  return or_subnormal(y, times_power_of_2(p, n + 149.0f, x, kUnderflow<float>));
}

template <class U, class T>
void probabilities(const U* x, float pivot, float factor, float* buffer, T* out, int64_t n,
                   bool streams) {
  scaled_exponentials(x, pivot, factor, buffer, out, n, streams,
                      [=](auto y, auto shifted) { return with_subnormals<T>(y, shifted, factor); });
}

template <class U, class T>
void probabilities_of_kept(const float* e, float rescale, const U* x, float pivot, float factor,
                           float*, T* out, int64_t n) {
  rescale = roundable(rescale);
  const auto y = [=](auto power, auto z) {
    return with_subnormals<T>(power * rescale, z - pivot, factor);
  };
  write_each(y, out, n, false, e, x);
}

// n is a multiple of kPair.
template <class T>
void add_subnormals_of_columns(const float* x, const float* pivot, const float* factor, float* y,
                               int64_t n) {
  for (int64_t b = 0; b < n; b += kPair) {
    const Pair shifted = load_pair(x + b) - load_pair(pivot + b);
    store_pair(with_subnormals<T>(load_pair(y + b), shifted, load_pair(factor + b)), y + b);
  }
}
#endif

}  // namespace pyfused
