// Exponentials of many elements at once, for the loops that cross-entropy spends its time in.
//
// The plain loops are what compilers vectorise. In registers of our own, several at a time and with
// masks for what a row leaves over, rows take 1.2 to 1.9 times less.
#pragma once

#include <iterator>

#include "memory.h"
#include "registers.h"
#include "vec.h"

namespace pyfused {

// The largest of x and `highest`; NaN is never the largest.
template <class T, class A> A largest(const T* x, int64_t n, A highest) {
  PYFUSED_SIMD(reduction(max : highest))
  for (int64_t i = 0; i < n; ++i) highest = widen(x[i]) > highest ? widen(x[i]) : highest;
  return highest;
}

// The sum of exp(x - pivot), each kept in `e` where Keeps, on its way to `out`. Where an x is
// Unbounded and exceeds the pivot by more than 88, the sum is as if it were 88: more than a row is
// content with.
constexpr float kTop = 88.0f;
template <bool Keeps, bool Unbounded, class T, class A, class Out>
A sum_exponentials(const T* x, A pivot, A* e, const Out* /* out */, int64_t n) {
  A sum = 0;
  PYFUSED_SIMD(reduction(+ : sum))
  for (int64_t i = 0; i < n; ++i) {
    const A shifted = widen(x[i]) - pivot;
    const A value = exp_shifted(Unbounded && shifted > kTop ? A(kTop) : shifted);
    if (Keeps) e[i] = value;
    sum += value;
  }
  return sum;
}

// out = exp(x - pivot) factor; past the cache where it `streams` and the ISA has a use for that.
// Inlined, this loop is one that GCC 12 leaves scalar for double (13 times slower).
template <class U, class A, class T>
PYFUSED_NOINLINE void scaled_exponentials(const U* x, A pivot, A factor, A* buffer, T* out,
                                          int64_t n, bool /* streams */) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) wide[i] = exp_shifted(widen(x[i]) - pivot) * factor;
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
  for (int64_t i = 0; i < n; ++i) e[i] = exp_shifted(x[i] - pivot[i]);
}

#ifdef PYFUSED_HAS_REGISTERS
// exp(r), |r| <= ln(2) / 2, by powers of r from the highest down, as exactly as what is rounded to
// T can tell: to 2^-23.7, 2^-18.4 for float16, 2^-13.2 for bfloat16.
template <class T> constexpr float kExp[] = {8.29031505e-3f, 4.18979302e-2f, 1.66676402e-1f,
                                             4.99991506e-1f, 9.99999702e-1f, 1.0f};
template <>
inline constexpr float kExp<float16>[] = {4.15035798e-2f, 1.67878997e-1f, 5.00031562e-1f,
                                          9.99966557e-1f, 1.0f};
template <>
inline constexpr float kExp<bfloat16>[] = {1.65178276e-1f, 5.04134497e-1f, 1.00019623f, 1.0f};

// exp(x) factor, to 2 + |x| / 30 ULP of a float; falls to 0 below its range. Every instruction here
// is some 6% of a row's time; four registers at a time take 1.2 times less than two.
template <class T, class V> PYFUSED_INLINE V exp_floats(V x, float factor = 1) {
  x = larger(-104.0f, x);
  const V n = rounded(x * 1.44269504f);
  const V r = x - n * 0.693147182f;
  V p = r * (kExp<T>[0] * factor) + kExp<T>[1] * factor;
  for (size_t i = 2; i < std::size(kExp<T>); ++i) p = p * r + kExp<T>[i] * factor;
  return times_power_of_2(p, n);
}

template <class T> float largest(const T* x, int64_t n, float highest) {
  Quad high = {both(highest), both(highest)};  // no maximum waits for the one before it
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) high = larger(load_quad(x + i), high);
  for (; i < n; i += kPair) high.low = larger(load_pair(x + i, n - i), high.low);
  return largest_lane(larger(high.low, high.high));
}

// Asks for the lines of `out` meanwhile, which the gradient waits for otherwise: 1.1 to 1.3 times
// faster, if it does not look as far ahead in x as others do.
template <bool Keeps, bool Unbounded, class T, class Out>
float sum_exponentials(const T* x, float pivot, float* e, const Out* out, int64_t n) {
  constexpr int64_t kAheadOfX = Keeps ? kAhead<T> / 2 : kAhead<T>;
  const auto exponentials = [&](auto y) {
    return exp_floats<float>(Unbounded ? at_most(kTop, y - pivot) : y - pivot);
  };
  Pair sum = both(0);
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    prefetch_quad(x + i + kAheadOfX);
    if (Keeps) prefetch_quad(out + i);
    const Quad values = exponentials(load_quad(x + i));
    if (Keeps) store_quad(values, e + i);
    sum = sum + (values.low + values.high);
  }
  for (; i < n; i += kPair) {
    const Pair values = first_elements(exponentials(load_pair(x + i, n - i, pivot)), n - i);
    if (Keeps) store_pair(values, e + i);  // a whole one: there is room
    sum = sum + values;
  }
  return sum_of_lanes(sum);
}

// Rounds and writes f(x). Past the row's end stands what f has an easy time with: an exponential
// that underflows there takes as long as some ten others.
template <class U, class F, class T>
PYFUSED_INLINE void write_each(const U* x, float others, const F& f, T* out, int64_t n,
                               bool streams) {
  streams = streams && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    const Quad y = f(load_quad(x + i));
    streams ? stream_quad(y, out + i) : store_quad(y, out + i);
  }
  for (; i < n; i += kPair) store_pair(f(load_pair(x + i, n - i, others)), out + i, n - i);
}

template <class U, class T>
void scaled_exponentials(const U* x, float pivot, float factor, float*, T* out, int64_t n,
                         bool streams) {
  if (std::isfinite(factor)) {
    write_each(x, pivot, [=](auto y) { return exp_floats<T>(y - pivot, factor); }, out, n, streams);
  } else {
    factor = roundable(factor);
    write_each(
        x, pivot, [=](auto y) { return exp_floats<T>(y - pivot) * factor; }, out, n, streams);
  }
}

template <class T> void scaled(const float* e, float factor, float*, T* out, int64_t n) {
  factor = roundable(factor);
  write_each(e, 0, [=](auto y) { return y * factor; }, out, n, false);
}

// n fills pairs.
PYFUSED_INLINE void exponentials(const float* x, const float* pivot, float* e, int64_t n) {
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    store_quad(exp_floats<float>(load_quad(x + i) - load_quad(pivot + i)), e + i);
  }
  for (; i < n; i += kPair) {
    store_pair(exp_floats<float>(load_pair(x + i) - load_pair(pivot + i)), e + i);
  }
}
#endif

}  // namespace pyfused
