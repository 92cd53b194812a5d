// Pairs and quads of registers of floats, for exponentials.h. avx512.h and avx2.h define one
// register and a pair. PYFUSED_HAS_REGISTERS is defined if one of them is included.
//
// An operator processes all registers before the next operator starts: the CPU then has independent
// instructions while a result is pending.
#pragma once

#include <limits>

#include "vec.h"

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

// Returns y if x or y is NaN.
template <int N> PYFUSED_INLINE Registers<N> maximum(Registers<N> x, Registers<N> y) {
  return {maximum(x.low, y.low), maximum(x.high, y.high)};
}
template <int N> PYFUSED_INLINE Registers<N> maximum(float x, Registers<N> y) {
  return {maximum(x, y.low), maximum(x, y.high)};
}
// x > 0. If y is NaN, returns x or y.
template <int N> PYFUSED_INLINE Registers<N> minimum(float x, Registers<N> y) {
  return {minimum(x, y.low), minimum(x, y.high)};
}
template <int N> PYFUSED_INLINE Registers<N> round_to_int(Registers<N> x) {
  return {round_to_int(x.low), round_to_int(x.high)};
}
template <int N> PYFUSED_INLINE Registers<N> fraction(Registers<N> t) {
  return {fraction(t.low), fraction(t.high)};
}
template <int N>
PYFUSED_INLINE Registers<N> times_power_of_floor(Registers<N> p, Registers<N> t) {
  return {times_power_of_floor(p.low, t.low), times_power_of_floor(p.high, t.high)};
}
template <int N> PYFUSED_INLINE Registers<N> times_power_of_2(Registers<N> p, Registers<N> n,
                                                              Registers<N> x, float least) {
  return {times_power_of_2(p.low, n.low, x.low, least),
          times_power_of_2(p.high, n.high, x.high, least)};
}

// x, with a NaN replaced by one that stays NaN when its lower bits are rounded away.
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
