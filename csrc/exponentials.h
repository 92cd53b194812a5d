// Exponentials of many elements, the inner loops of softmax and cross-entropy.
//
// The templates here are plain loops for the compiler to vectorise. The overloads for float, where
// there is AVX2 or AVX-512, use several registers at a time and masks for the end of a row: rows
// are 1.2 to 1.9 times faster.
#pragma once

#include <algorithm>
#include <iterator>

#include "memory.h"
#include "registers.h"
#include "vec.h"

namespace pyfused {

// The largest of x and `highest`; NaN is never the largest.
template <class T, class A> A largest(const T* x, int64_t n, A highest) {
  int64_t first = 0;
#ifdef __clang__  // does not vectorise a loop over one maximum, which is 4 to 20 times slower
  constexpr int64_t kMany = 2 * kLanes<A>;
  A lanes[kMany];
  std::fill_n(lanes, kMany, highest);
  for (; first + kMany <= n; first += kMany) {
    for (int64_t k = 0; k < kMany; ++k) {
      const A value = widen(x[first + k]);
      lanes[k] = value > lanes[k] ? value : lanes[k];
    }
  }
  for (int64_t half = kMany / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) {
      lanes[k] = lanes[k + half] > lanes[k] ? lanes[k + half] : lanes[k];
    }
  }
  highest = lanes[0];
#else
  PYFUSED_SIMD(reduction(max : highest))
#endif
  for (int64_t i = first; i < n; ++i) highest = widen(x[i]) > highest ? widen(x[i]) : highest;
  return highest;
}

// The sum of exp(x - pivot). With Keeps, each is written to `e`; `out`, where the results will go,
// is prefetched if there are registers. With Unbounded, x - pivot is clamped to 88, which avoids
// infinity: the sum is then so large that Normalizer raises the pivot.
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

// out = exp(x - pivot) factor. `streams` asks for non-temporal stores, which only the overloads in
// registers have. Not inlined: GCC 12 would leave the loop of doubles scalar (13 times slower).
template <class U, class A, class T>
PYFUSED_NOINLINE void scaled_exponentials(const U* x, A pivot, A factor, A* buffer, T* out,
                                          int64_t n, bool /* streams */) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) wide[i] = exp_shifted(widen(x[i]) - pivot) * factor;
  store(wide, out, n);
}

struct WeightedSum {
  double sum, weighted;
};

// The sums of e = exp(x - pivot) and of e (x - pivot). Unbounded as in sum_exponentials. Few terms
// at a time, because sums in few lanes would lose digits.
template <bool Unbounded, class T, class A>
WeightedSum weighted_exponentials(const T* x, A pivot, int64_t n) {
  constexpr int64_t kTerms = 128;
  WeightedSum total{};
  for (int64_t first = 0; first < n; first += kTerms) {
    const int64_t end = std::min(n, first + kTerms);
    A sum = 0, weighted = 0;
    PYFUSED_SIMD(reduction(+ : sum, weighted))
    for (int64_t i = first; i < end; ++i) {
      const A shifted = widen(x[i]) - pivot;
      const A y = Unbounded && shifted > kTop ? A(kTop) : shifted;
      const A e = exp_shifted(y);
      sum += e;
      weighted += e == 0 ? A(0) : e * y;  // 0 * inf is NaN
    }
    total.sum += double(sum);
    total.weighted += double(weighted);
  }
  return total;
}

// out = e (a + b (x - pivot)), where e is 0 below kLeast. Not inlined for the reason of
// scaled_exponentials.
template <class U, class A, class T>
PYFUSED_NOINLINE void linear_exponentials(const U* x, A pivot, A a, A b, A* buffer, T* out,
                                          int64_t n, bool /* streams */) {
  constexpr A kLeast = -1000;  // finite, as 0 * inf is NaN; but a NaN among a and b stays
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    const A shifted = widen(x[i]) - pivot, y = shifted < kLeast ? kLeast : shifted;
    wide[i] = exp_shifted(y) * (b * y + a);
  }
  store(wide, out, n);
}

// out = e factor
template <class A, class T> void scaled(const A* e, A factor, A* buffer, T* out, int64_t n) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) wide[i] = e[i] * factor;
  store(wide, out, n);
}

// e = exp(x - pivot), with a pivot for each element.
template <class A>
PYFUSED_INLINE void exponentials(const A* x, const A* pivot, A* e, int64_t n) {
  for (int64_t i = 0; i < n; ++i) e[i] = exp_shifted(x[i] - pivot[i]);
}

// Equally spaced rows, in a tile or in the tensor itself.
template <class A> struct Lines {
  const A* data;
  int64_t stride;

  const A* operator[](int64_t row) const { return data + row * stride; }
  Lines from(int64_t row) const { return {data + row * stride, stride}; }
};

// Raises `highest` to the maximum of each column of k rows.
template <int64_t kColumns, class A>
PYFUSED_INLINE void largest_of_columns(Lines<A> x, int64_t k, A* highest) {
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t b = 0; b < kColumns; ++b) highest[b] = x[i][b] > highest[b] ? x[i][b] : highest[b];
  }
}

// e = exp(x - pivot), with a pivot for each column, and the sum of each column. Without Keeps, e is
// one row, which is overwritten.
template <int64_t kColumns, bool Keeps, class A>
PYFUSED_INLINE void exponentials_of_columns(Lines<A> x, const A* pivot, int64_t k, A* e, A* sums) {
  std::fill_n(sums, kColumns, A(0));
  for (int64_t i = 0; i < k; ++i) {
    A* const powers = Keeps ? e + i * kColumns : e;
    exponentials(x[i], pivot, powers, kColumns);
    for (int64_t b = 0; b < kColumns; ++b) sums[b] += powers[b];
  }
}

// The sum of each column of x y; without kProducts, of x.
template <int64_t kColumns, bool kProducts, class T, class A>
PYFUSED_INLINE void sums_of_columns(Lines<T> x, Lines<T> y, int64_t k, A* sums) {
  std::fill_n(sums, kColumns, A(0));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t b = 0; b < kColumns; ++b) sums[b] += kProducts ? x[i][b] * y[i][b] : x[i][b];
  }
}

// The gradient of softmax or, with kLogarithm, of log_softmax, from its output y; total is the sum
// of dy y or of dy over the classes.
template <bool kLogarithm, class T, class A>
PYFUSED_INLINE void softmax_gradient(const T* dy, const T* y, const A* total, T* dx, int64_t n) {
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    dx[i] = kLogarithm ? dy[i] - exp_shifted(y[i]) * total[i] : y[i] * (dy[i] - total[i]);
  }
}

#ifdef PYFUSED_HAS_REGISTERS
constexpr float kLog2E = 1.44269504f;

// Coefficients of a polynomial for exp(r), |r| <= ln(2) / 2, highest power first. Its error is
// 2^-23.7.
constexpr float kExp[] = {8.29031505e-3f, 4.18979302e-2f, 1.66676402e-1f,
                          4.99991506e-1f, 9.99999702e-1f, 1.0f};
// Coefficients for 2^f, 0 <= f <= 1. The error is below the rounding to T: 2^-23.5 for float,
// 2^-18.4 for float16, 2^-13.5 for bfloat16.
template <class T> constexpr float kExp2[] = {1.86712854e-3f, 9.01703443e-3f, 5.57999089e-2f,
                                              2.40164459e-1f, 6.93151295e-1f, 1.0f};
template <>
inline constexpr float kExp2<float16>[] = {1.34266838e-2f, 5.22424728e-2f, 2.41280198e-1f,
                                           6.93044841e-1f, 1.0f};
template <>
inline constexpr float kExp2<bfloat16>[] = {7.70670399e-2f, 2.27644995e-1f, 6.95116758e-1f, 1.0f};

template <size_t n, class V>
PYFUSED_INLINE V polynomial(const float (&coefficients)[n], V x, float factor) {
  V p = x * (coefficients[0] * factor) + coefficients[1] * factor;
  for (size_t i = 2; i < n; ++i) p = p * x + coefficients[i] * factor;
  return p;
}

// 2^t factor, to the polynomial's error; 0 where 2^t < 2^-126. If t is a rounded product, its
// rounding adds an error of at most |t| / 3 ULP of a float, which is less than the rounding to half
// precision.
template <class T, class V> PYFUSED_INLINE V exp2_floats(V t, float factor = 1) {
  return times_power_of_floor(polynomial(kExp2<T>, fraction(t), factor), t);
}

// exp(x) factor, to the precision of T: 2 + |x| / 30 ULP for float. It is 0 where exp(x) < 2^-126,
// because many processors take a hundred cycles for a result that is subnormal or rounds to 0. Each
// instruction here is about 6% of a row's time. Four registers at a time are 1.2 times faster than
// two.
template <class T, class V> PYFUSED_INLINE V exp_floats(V x, float factor = 1) {
  if constexpr (!std::is_same_v<T, float>) return exp2_floats<T>(x * kLog2E, factor);
  const V n = round_to_int(x * kLog2E);
  const V r = x - n * 0.693147182f;
  return times_power_of_2(polynomial(kExp, r, factor), n, x, -87.3365f);
}

// exp(x - pivot) = 2^(x log2(e) - shift) correction: for each x, three instructions fewer than
// exp(x - pivot) takes, 1.1 to 1.2 times faster. The correction is 2^(rounding error of
// the shift), by the first two terms of its series, which suffice where the pivot is `near` 0.
struct Base2Pivot {
  float shift, correction;
  bool near;

  explicit Base2Pivot(float pivot)
      : shift(pivot * kLog2E), correction(1 + std::fma(-kLog2E, pivot, shift) * 0.693147182f),
        near(std::abs(pivot) < 256) {}
};

template <class T> float largest(const T* x, int64_t n, float highest) {
  Quad high = {broadcast(highest), broadcast(highest)};  // two independent maxima
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) high = maximum(load_quad(x + i), high);
  for (; i < n; i += kPair) high.low = maximum(load_pair(x + i, n - i), high.low);
  return largest_lane(maximum(high.low, high.high));
}

// Prefetches `out` as well, which the gradient is written to next: 1.1 to 1.3 times faster, if x is
// prefetched at half the usual distance.
template <bool Keeps, class T, class F, class Out>
PYFUSED_INLINE float sum_powers(const T* x, const F& power, float* e, const Out* out, int64_t n) {
  constexpr int64_t kDistance = Keeps ? kPrefetchDistance<T> / 2 : kPrefetchDistance<T>;
  Pair sum = broadcast(0);
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    prefetch_quad(x + i + kDistance);
    if (Keeps) prefetch_quad(out + i);
    const Quad values = power(load_quad(x + i));
    if (Keeps) store_quad(values, e + i);
    sum = sum + (values.low + values.high);
  }
  for (; i < n; i += kPair) {
    const Pair values = zero_after(power(load_pair(x + i, n - i)), n - i);
    if (Keeps) store_pair(values, e + i);  // the whole pair: e has room for it
    sum = sum + values;
  }
  return sum_of_lanes(sum);
}

// Base 2 loses accuracy in each power. In a sum, these errors are weighted by the powers and stay
// below a rounding error. Powers that are kept for float results use base e for full accuracy.
template <bool Keeps, bool Unbounded, class T, class Out>
float sum_exponentials(const T* x, float pivot, float* e, const Out* out, int64_t n) {
  if constexpr (!(Keeps && std::is_same_v<Out, float>)) {
    const Base2Pivot base2(pivot);
    const auto power = [=](auto y) {
      const auto t = y * kLog2E - base2.shift;
      return exp2_floats<float>(Unbounded && !kPowersOverflow ? minimum(127.0f, t) : t);
    };
    if (base2.near) return sum_powers<Keeps>(x, power, e, out, n) * base2.correction;
  }
  const auto power = [=](auto y) {
    return exp_floats<float>(Unbounded ? minimum(kTop, y - pivot) : y - pivot);
  };
  return sum_powers<Keeps>(x, power, e, out, n);
}

// Writes f(x), rounded to T, of one or two arrays x.
template <class F, class T, class... U>
PYFUSED_INLINE void write_each(const F& f, T* out, int64_t n, bool streams, const U*... x) {
  streams = streams && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    const Quad y = f(load_quad(x + i)...);
    streams ? stream_quad(y, out + i) : store_quad(y, out + i);
  }
  for (; i < n; i += kPair) store_pair(f(load_pair(x + i, n - i)...), out + i, n - i);
}

// `finish` maps a result and x - pivot to what is written.
struct Unchanged {
  template <class V> PYFUSED_INLINE V operator()(V y, V /* shifted */) const { return y; }
};
template <class U, class T, class Finish = Unchanged>
void scaled_exponentials(const U* x, float pivot, float factor, float*, T* out, int64_t n,
                         bool streams, const Finish& finish = {}) {
  if constexpr (std::is_same_v<T, float>) {
    if (std::isfinite(factor)) {
      const auto power = [=](auto z) {
        const auto shifted = z - pivot;
        return finish(exp_floats<T>(shifted, factor), shifted);
      };
      return write_each(power, out, n, streams, x);
    }
  } else if (const Base2Pivot base2(pivot); base2.near && std::isfinite(factor)) {
    factor *= base2.correction;
    const auto power = [=](auto z) {
      return finish(exp2_floats<T>(z * kLog2E - base2.shift, factor), z - pivot);
    };
    return write_each(power, out, n, streams, x);
  }
  factor = roundable(factor);
  const auto power = [=](auto z) { return finish(exp_floats<T>(z - pivot) * factor, z - pivot); };
  write_each(power, out, n, streams, x);
}

// exp_floats is 0 at -104, so an infinite x - pivot adds 0.
template <bool Unbounded, class T>
WeightedSum weighted_exponentials(const T* x, float pivot, int64_t n) {
  const auto shifted = [&](auto z) {
    return maximum(-104.0f, Unbounded ? minimum(kTop, z - pivot) : z - pivot);
  };
  Pair sum = broadcast(0), weighted = broadcast(0);
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    prefetch_quad(x + i + kPrefetchDistance<T>);
    const Quad y = shifted(load_quad(x + i)), e = exp_floats<float>(y), term = e * y;
    sum = sum + (e.low + e.high);
    weighted = weighted + (term.low + term.high);
  }
  for (; i < n; i += kPair) {
    const Pair y = shifted(load_pair(x + i, n - i, pivot));
    const Pair e = zero_after(exp_floats<float>(y), n - i);
    sum = sum + e;
    weighted = weighted + e * y;
  }
  return {sum_of_lanes(sum), sum_of_lanes(weighted)};
}

template <class U, class T>
void linear_exponentials(const U* x, float pivot, float a, float b, float*, T* out, int64_t n,
                         bool streams) {
  a = roundable(a);
  b = roundable(b);
  write_each(
      [=](auto z) {
        const auto y = maximum(-104.0f, z - pivot);
        return exp_floats<T>(y) * (y * b + a);
      },
      out, n, streams, x);
}

template <class T> void scaled(const float* e, float factor, float*, T* out, int64_t n) {
  factor = roundable(factor);
  write_each([=](auto y) { return y * factor; }, out, n, false, e);
}

// n is a multiple of kPair.
PYFUSED_INLINE void exponentials(const float* x, const float* pivot, float* e, int64_t n) {
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    store_quad(exp_floats<float>(load_quad(x + i) - load_quad(pivot + i)), e + i);
  }
  for (; i < n; i += kPair) {
    store_pair(exp_floats<float>(load_pair(x + i) - load_pair(pivot + i)), e + i);
  }
}

// A maximum or a sum stays in registers while the rows are read. kColumns is a multiple of kPair.
template <int64_t kColumns>
PYFUSED_INLINE void largest_of_columns(Lines<float> x, int64_t k, float* highest) {
  for (int64_t b = 0; b < kColumns; b += kPair) {
    Pair high = load_pair(highest + b);
    for (int64_t i = 0; i < k; ++i) high = maximum(load_pair(x[i] + b), high);
    store_pair(high, highest + b);
  }
}

template <int64_t kColumns, bool Keeps>
PYFUSED_INLINE void exponentials_of_columns(Lines<float> x, const float* pivot, int64_t k, float* e,
                                            float* sums) {
  for (int64_t b = 0; b < kColumns; b += kPair) {
    const Pair shift = load_pair(pivot + b);
    Pair sum = broadcast(0);
    for (int64_t i = 0; i < k; ++i) {
      const Pair value = exp_floats<float>(load_pair(x[i] + b) - shift);
      if (Keeps) store_pair(value, e + i * kColumns + b);
      sum = sum + value;
    }
    store_pair(sum, sums + b);
  }
}

template <int64_t kColumns, bool kProducts, class T>
PYFUSED_INLINE void sums_of_columns(Lines<T> x, Lines<T> y, int64_t k, float* sums) {
  for (int64_t b = 0; b < kColumns; b += kPair) {
    Pair sum = broadcast(0);
    for (int64_t i = 0; i < k; ++i) {
      const Pair value = load_pair(x[i] + b);
      sum = sum + (kProducts ? value * load_pair(y[i] + b) : value);
    }
    store_pair(sum, sums + b);
  }
}

// n is a multiple of kPair.
template <bool kLogarithm, class T>
PYFUSED_INLINE void softmax_gradient(const T* dy, const T* y, const float* total, T* dx,
                                     int64_t n) {
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair of_output = load_pair(dy + i), value = load_pair(y + i), sum = load_pair(total + i);
    store_pair(kLogarithm ? of_output - exp_floats<T>(value) * sum : value * (of_output - sum),
               dx + i);
  }
}
#endif

}  // namespace pyfused
