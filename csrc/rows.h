// Row layout: the classes of a position are contiguous, and vectors run along them. A row is
// processed in chunks whose buffers stay in L1.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#include "exponentials.h"
#include "positions.h"
#include "row_terms.h"
#include "transpose.h"

namespace pyfused {

// From this many classes on the row layout is faster than the column layout. The column layout
// needs a transposed tile, so the threshold depends on whether T is transposed in registers.
template <class T> constexpr int64_t kRowClasses = kTransposes<T> ? 128 : 48;
constexpr int64_t kChunk = 1024;  // classes; the buffers of a chunk stay in L1

// A thread takes blocks of as many rows as have up to this many elements.
constexpr int64_t kBlockElements = 16384;
inline int64_t rows_of_block(int64_t classes) {
  return std::max<int64_t>(1, kBlockElements / classes);
}

// Rows of up to this many classes keep exp(x - pivot), which fits in L1 with the input and the
// output: 1.1 to 1.2 times faster. From twice as many classes on, recomputing it is 1.2 to 1.4
// times faster.
template <class T>
constexpr int64_t kKept = (1 << 15) / (2 * sizeof(T) + sizeof(Accumulate<T>)) / kChunk * kChunk;

// Calls body(chunk index, first class, classes) for each chunk.
template <class Body> void for_chunks(int64_t classes, const Body& body) {
  for (int64_t chunk = 0, first = 0; first < classes; ++chunk, first += kChunk) {
    body(chunk, first, std::min(kChunk, classes - first));
  }
}

// The state of a row (row_terms.h) without the target, in one read.
template <class T> class Normalizer {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
  static constexpr double kMaxTerms = 1024;  // about exp(7)

 public:
  A pivot = kLowest;  // at most 7 below the largest element
  double sum = 0;     // the sum of exp(x - pivot)
  double weighted = 0;                     // the sum of exp(x - pivot) (x - pivot), if Weighted
  A pivots[kKept<T> / kChunk + 1];         // the pivot that each chunk was summed against
  alignas(kVectorBytes) A kept[kKept<T>];  // exp(x - pivots), where the row keeps it

  // The largest element of a row's first chunk. Cross-entropy computes it for the next row before
  // it finishes the current one, and the CPU overlaps the two: 1.1 times faster at 1,000 classes.
  static A first_max(const T* x, int64_t classes) {
    return largest(x, std::min(kChunk, classes), kLowest);
  }

  // Sums each chunk against the current pivot. If a chunk outweighs the chunks before it, which is
  // rare, the pivot rises to the chunk's largest element. at(first, n) is a chunk in memory, of T
  // or of A; chunk_read(x, first, n) is called after each chunk. `out` is the destination of the
  // row's result. `first_max` is the largest element of the first chunk, kLowest if it is unknown.
  // Continues from the chunks of previous calls.
  template <bool Keeps, bool Weighted = false, class At, class ChunkRead>
  PYFUSED_INLINE void read(const At& at, T* out, int64_t classes, const ChunkRead& chunk_read,
                           A first_max = kLowest) {
    for_chunks(classes, [&](int64_t chunk, int64_t first, int64_t n) {
      const auto* const x = at(first, n);
      A* const e = Keeps ? kept + first : nullptr;
      T* const result = Keeps ? out + first : nullptr;
      const auto sums = [&](auto unbounded, A shift) {
        if constexpr (Weighted) return weighted_exponentials<unbounded>(x, shift, n);
        else return WeightedSum{sum_exponentials<Keeps, unbounded>(x, shift, e, result, n), 0};
      };
      const bool begun = chunk > 0 || pivot > kLowest;
      WeightedSum terms{};
      if (begun) terms = sums(std::true_type{}, pivot);
      if (!begun || !(terms.sum <= std::min(8 * sum, kMaxTerms))) {
        const A high = !chunk && first_max > kLowest ? first_max : largest(x, n, pivot);
        // While every element is -inf the shift is 0: -inf - -inf would be NaN.
        const A shift = high == kLowest ? A(0) : high;
        const double by = double(pivot) - double(shift), factor = exp_shifted(A(by));
        if (Weighted) weighted = sum > 0 ? factor * (weighted + by * sum) : 0;
        sum *= factor;
        pivot = high;
        terms = sums(std::false_type{}, shift);
        // Rounding errors would make losses negative whose true value is 0.
        if (shift == high && terms.sum < 1) terms.sum = 1;
      }
      if (Keeps) pivots[chunk] = pivot;
      sum += terms.sum;
      if (Weighted) weighted += terms.weighted;
      chunk_read(x, first, n);
    });
  }
  template <bool Keeps, class At>
  PYFUSED_INLINE void read(const At& at, T* out, int64_t classes) {
    read<Keeps>(at, out, classes, [](const auto*, int64_t, int64_t) {});
  }

  // Returns the factor that makes the kept exponentials of a chunk relative to the final pivot.
  double rescale(int64_t chunk) const {
    return pivots[chunk] == pivot ? 1 : exp_shifted(pivots[chunk] - pivot);
  }
};

// A row of x = scale z, or with a softcap x = scale softcap tanh(z / softcap), of the logits z.
template <class T, bool kInPlace> class Row {
  using A = Accumulate<T>;

 public:
  Normalizer<T> state;

  // kInPlace: x is z.
  Row(const T* logits, int64_t classes, double scale, std::optional<double> cap = {})
      : logits(logits), classes(classes), scale(A(scale)), capped(cap),
        softcap(A(std::max(cap.value_or(1), double(std::numeric_limits<A>::min())))) {}

  // n elements x from a class on. The next call may overwrite them.
  PYFUSED_INLINE auto chunk(int64_t first, int64_t n) {
    const T* const z = logits + first;
    if constexpr (kInPlace) {
      return z;
    } else {
      load(z, x, n);
      if (capped) {
        PYFUSED_SIMD()
        for (int64_t i = 0; i < n; ++i) {
          const A t = tanh_of(x[i] / softcap);
          x[i] = softcap * t;
          slopes[i] = (1 - t) * (1 + t);
        }
      }
      for (int64_t i = 0; i < n; ++i) x[i] *= scale;
      return static_cast<const A*>(x);
    }
  }

  // Finds the state. `grad` is the destination of the gradient.
  template <bool Keeps, bool Weighted, class ChunkRead>
  PYFUSED_INLINE void read(T* grad, const ChunkRead& chunk_read,
                           A first_max = -std::numeric_limits<A>::infinity()) {
    const auto at = [this](int64_t first, int64_t n) { return chunk(first, n); };
    state.template read<Keeps, Weighted>(at, grad, classes, chunk_read, first_max);
  }

  // Writes e (a + b (x - pivot)) - s w times dx/dz / scale; weights(first, n) is a chunk of w.
  // `keeps`: read() kept the exponentials, where b is 0.
  template <class Weights>
  void write_gradient(const RowTerms& terms, bool keeps, T* grad, bool streams,
                      const Weights& weights) {
    const A pivot = state.pivot, a = A(terms.a), b = A(terms.b), s = A(terms.s);
    const bool plain = s == 0 && !capped;
    for_chunks(classes, [&](int64_t number, int64_t first, int64_t n) {
      T* const out = grad + first;
      const A* e = state.kept + first;
      const A factor = keeps ? A(terms.a * state.rescale(number)) : A(1);
      if (keeps && plain) return scaled(e, factor, buffer, out, n);
      if (!keeps) {
        const auto* const x = chunk(first, n);
        const auto write = [&](auto* to, bool streams) {
          if (b == 0) return scaled_exponentials(x, pivot, a, buffer, to, n, streams);
          linear_exponentials(x, pivot, a, b, buffer, to, n, streams);
        };
        if (plain) return write(out, streams);
        write(buffer, false);
        e = buffer;
      }
      A* const wide = capped ? buffer : staged(out, buffer);
      if (s != 0) {
        const A* const w = weights(first, n);
        PYFUSED_SIMD()
        for (int64_t i = 0; i < n; ++i) wide[i] = e[i] * factor - s * w[i];
      }
      for (int64_t i = 0; capped && i < n; ++i) wide[i] *= slopes[i];
      store(wide, out, n);
    });
  }

 private:
  const T* const logits;
  const int64_t classes;
  const A scale;
  const bool capped;
  const A softcap;  // at least the smallest normal number
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A x[kInPlace ? 1 : kChunk];
  alignas(kVectorBytes) A slopes[kInPlace ? 1 : kChunk];  // dx/dz / scale, with a softcap
};

}  // namespace pyfused
