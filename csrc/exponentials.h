// Exponentials of many elements at once, for the loops that cross-entropy spends its time in.
//
// The plain loops are what compilers vectorise. AVX-512 has instructions for both ends of exp that they
// do not find, and masks for what a row leaves over; with these, whole rows take 1.2 to 1.6 times less.
#pragma once

#include "memory.h"
#include "vec.h"

#ifdef __AVX512F__
#include "avx512.h"
#endif

namespace pyfused {

// The largest of x and `highest`; NaN is never the largest.
template <class T, class A> A largest(const T* x, int64_t n, A highest) {
  PYFUSED_SIMD(reduction(max : highest))
  for (int64_t i = 0; i < n; ++i) highest = widen(x[i]) > highest ? widen(x[i]) : highest;
  return highest;
}

// The sum of exp(x - pivot), each kept in `e` where Keeps; raises `highest` to the largest x.
template <bool Keeps, class T, class A>
A sum_exponentials(const T* x, A* e, int64_t n, A pivot, A& highest) {
  A high = highest, sum = 0;
  PYFUSED_SIMD(reduction(+ : sum) reduction(max : high))
  for (int64_t i = 0; i < n; ++i) {
    const A element = widen(x[i]), value = exp_nonpositive(element - pivot);
    high = element > high ? element : high;
    if (Keeps) e[i] = value;
    sum += value;
  }
  highest = high;
  return sum;
}

// out = exp(x - pivot) factor; past the cache where it `streams` and the ISA has a use for that.
// Inlined, this loop is one that GCC 12 leaves scalar for double (13 times slower).
template <class U, class A, class T>
PYFUSED_NOINLINE void scaled_exponentials(const U* x, A pivot, A factor, A* buffer, T* out, int64_t n,
                                          bool /* streams */) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) wide[i] = exp_nonpositive(widen(x[i]) - pivot) * factor;
  store(wide, out, n);
}

// out = e factor
template <class A, class T> void scaled(const A* e, A factor, A* buffer, T* out, int64_t n) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) wide[i] = e[i] * factor;
  store(wide, out, n);
}

// e = exp(x - pivot), with a pivot for each.
template <class A>
PYFUSED_INLINE void exponentials(const A* x, const A* pivot, A* e, int64_t n) {
  for (int64_t i = 0; i < n; ++i) e[i] = exp_nonpositive(x[i] - pivot[i]);
}

#ifdef __AVX512F__
// As exp_nonpositive, with one polynomial of a degree less and one constant for ln 2: 1.9 + |x| / 30
// ULP, and subnormal results. Every instruction here is some 6% of a row's time.
PYFUSED_INLINE __m512 exp_floats(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // of a number and NaN, this gives the NaN
  const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT);
  const __m512 r = x - n * 0.693147182f;
  __m512 p = r * 8.29031505e-3f + 4.18979302e-2f;
  p = p * r + 1.66676402e-1f;
  p = p * r + 4.99991506e-1f;
  p = p * r + 9.99999702e-1f;
  return _mm512_scalef_ps(p * r + 1.0f, n);
}

PYFUSED_INLINE Pair exp_pair(Pair x, Pair pivot) {
  return {exp_floats(x.low - pivot.low), exp_floats(x.high - pivot.high)};
}

PYFUSED_INLINE Pair larger(Pair x, Pair than) {  // where x is NaN, `than`
  return {_mm512_max_ps(x.low, than.low), _mm512_max_ps(x.high, than.high)};
}

PYFUSED_INLINE Pair both(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }

// Two pairs, so that no maximum waits for the one before it.
template <class T> float largest(const T* x, int64_t n, float highest) {
  Pair high = both(highest), other = high;
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    high = larger(load_pair(x + i), high);
    other = larger(load_pair(x + i + kPair), other);
  }
  for (; i < n; i += kPair) high = larger(load_pair(x + i, n - i), high);
  high = larger(high, other);
  return _mm512_reduce_max_ps(_mm512_max_ps(high.low, high.high));
}

template <bool Keeps, class T>
float sum_exponentials(const T* x, float* e, int64_t n, float pivot, float& highest) {
  Pair high = both(highest);
  __m512 sum = _mm512_setzero_ps();
  const auto add = [&](int64_t i, Pair elements) {
    const Pair values = exp_pair(elements, both(pivot));
    high = larger(elements, high);
    if (Keeps) store_pair(values, e + i);  // whole pairs: there is room
    sum += values.low + values.high;
  };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    for (int64_t k = 0; k < kPair; k += kVectorBytes / int64_t(sizeof(T))) {
      PYFUSED_PREFETCH(x + i + k + kAhead<T>);
    }
    add(i, load_pair(x + i));
  }
  if (i < n) add(i, load_pair(x + i, n - i));
  highest = _mm512_reduce_max_ps(_mm512_max_ps(high.low, high.high));
  return _mm512_reduce_add_ps(sum);
}

// Rounds and writes value(i, n) times a factor, for each pair of n elements.
template <class Value, class T>
PYFUSED_INLINE void write_scaled(const Value& value, float factor, T* out, int64_t n, bool streams) {
  if (factor != factor) factor = std::numeric_limits<float>::quiet_NaN();  // one that rounding leaves
  const auto scale = [&](Pair y) -> Pair { return {y.low * factor, y.high * factor}; };
  streams = streams && std::is_same_v<T, float> && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Pair y = scale(value(i, kPair));
    streams ? stream_pair(y, out + i) : store_pair(y, out + i);
  }
  if (i < n) store_pair(scale(value(i, n - i)), out + i, n - i);
}

template <class U, class T>
void scaled_exponentials(const U* x, float pivot, float factor, float*, T* out, int64_t n,
                         bool streams) {
  const auto value = [&](int64_t i, int64_t count) {
    return exp_pair(load_pair(x + i, count), both(pivot));
  };
  write_scaled(value, factor, out, n, streams);
}

template <class T> void scaled(const float* e, float factor, float*, T* out, int64_t n) {
  const auto value = [&](int64_t i, int64_t count) { return load_pair(e + i, count); };
  write_scaled(value, factor, out, n, false);
}

// n fills pairs.
PYFUSED_INLINE void exponentials(const float* x, const float* pivot, float* e, int64_t n) {
  for (int64_t i = 0; i < n; i += kPair) {
    store_pair(exp_pair(load_pair(x + i), load_pair(pivot + i)), e + i);
  }
}
#endif

}  // namespace pyfused
