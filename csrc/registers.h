// Registers of floats by twos and fours, for exponentials.h. A file for each instruction set says
// what one register does, how two of them are read and written as elements of any type, and what
// transpose.h does with one.
//
// An operator is done for all registers before the next one is for any: a result takes some cycles,
// in which the CPU needs others to work on, and it looks ahead to no more than some eight
// registers' exponentials.
#pragma once

#include <limits>

#include "vec.h"

namespace pyfused {

template <int N> struct Registers {
  Registers<N / 2> low, high;
};
using Pair = Registers<2>;
using Quad = Registers<4>;

constexpr float kLowestFloat = -std::numeric_limits<float>::infinity();

}  // namespace pyfused

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__GNUC__)
#include "avx2.h"
#endif

#ifdef PYFUSED_HAS_REGISTERS
namespace pyfused {

constexpr int64_t kPair = sizeof(Pair) / sizeof(float), kQuad = 2 * kPair;

template <int N> PYFUSED_INLINE Registers<N> operator+(Registers<N> x, Registers<N> y) {
  return {x.low + y.low, x.high + y.high};
}
template <int N> PYFUSED_INLINE Registers<N> operator-(Registers<N> x, Registers<N> y) {
  return {x.low - y.low, x.high - y.high};
}
template <int N> PYFUSED_INLINE Registers<N> operator*(Registers<N> x, Registers<N> y) {
  return {x.low * y.low, x.high * y.high};
}
template <int N> PYFUSED_INLINE Registers<N> operator+(Registers<N> x, float y) {
  return {x.low + y, x.high + y};
}
template <int N> PYFUSED_INLINE Registers<N> operator-(Registers<N> x, float y) {
  return {x.low - y, x.high - y};
}
template <int N> PYFUSED_INLINE Registers<N> operator*(Registers<N> x, float y) {
  return {x.low * y, x.high * y};
}

// Of a number and NaN, the second.
template <int N> PYFUSED_INLINE Registers<N> larger(Registers<N> x, Registers<N> y) {
  return {larger(x.low, y.low), larger(x.high, y.high)};
}
template <int N> PYFUSED_INLINE Registers<N> larger(float x, Registers<N> y) {
  return {larger(x, y.low), larger(x, y.high)};
}
// Of a number and NaN, either.
template <int N> PYFUSED_INLINE Registers<N> at_most(float x, Registers<N> y) {
  return {at_most(x, y.low), at_most(x, y.high)};
}
template <int N> PYFUSED_INLINE Registers<N> rounded(Registers<N> x) {
  return {rounded(x.low), rounded(x.high)};
}
template <int N> PYFUSED_INLINE Registers<N> times_power_of_2(Registers<N> x, Registers<N> n) {
  return {times_power_of_2(x.low, n.low), times_power_of_2(x.high, n.high)};
}

// What rounding to half a float leaves a NaN.
PYFUSED_INLINE float roundable(float x) {
  return x != x ? std::numeric_limits<float>::quiet_NaN() : x;
}

template <class T> PYFUSED_INLINE Quad load_quad(const T* x) {
  return {load_pair(x), load_pair(x + kPair)};
}
template <class T> PYFUSED_INLINE void store_quad(Quad x, T* to) {
  store_pair(x.low, to);
  store_pair(x.high, to + kPair);
}
template <class T> PYFUSED_INLINE void stream_quad(Quad x, T* to) {
  stream_pair(x.low, to);
  stream_pair(x.high, to + kPair);
}
template <class T> PYFUSED_INLINE void prefetch_quad(const T* x) {
  constexpr int64_t kLine = kVectorBytes / int64_t(sizeof(T));
  for (int64_t i = 0; i < kQuad; i += kLine) PYFUSED_PREFETCH(x + i);
}

}  // namespace pyfused
#endif
