// The classes of one position, which lie side by side: vectors run along them, some at a time, so that
// their buffers stay in L1.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponentials.h"
#include "positions.h"
#include "transpose.h"

namespace pyfused {

// From this many classes on a row fills enough vectors of its own; below, positions share vectors, which
// is the faster the faster a tile is transposed.
template <class T> constexpr int64_t kRowClasses = kTransposes<T> ? 128 : 48;
constexpr int64_t kChunk = 1024;  // classes at a time: the buffers of a chunk stay in L1

// As many rows as are worth a thread's while, of up to so many elements.
constexpr int64_t kBlockElements = 16384;
inline int64_t rows_of_block(int64_t classes) {
  return std::max<int64_t>(1, kBlockElements / classes);
}

// A row of up to so many classes keeps exp(x - pivot) for what is made of it: with input and output it
// fits in L1. That takes 1.1 to 1.2 times less time, and 1.2 to 1.4 times more from twice as many on,
// where it is quicker to compute than to fetch.
template <class T>
constexpr int64_t kKept = (1 << 15) / (2 * sizeof(T) + sizeof(Accumulate<T>)) / kChunk * kChunk;

// Calls body(part, first, n) for the classes of each part.
template <class Body> void for_parts(int64_t classes, const Body& body) {
  for (int64_t part = 0, first = 0; first < classes; ++part, first += kChunk) {
    body(part, first, std::min(kChunk, classes - first));
  }
}

// log sum_c exp(x_c) = pivot + log(sum), in one read of a row.
template <class T> class Normalizer {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
  static constexpr double kMost = 1024;  // exp(7), about

 public:
  A pivot = kLowest;  // the largest element, or less than it by up to 7
  double sum = 0;     // of exp(x - pivot)
  A pivots[kKept<T> / kChunk + 1];         // what the pivot was for each part
  alignas(kVectorBytes) A kept[kKept<T>];  // exp(x - pivots), of a row that is kept

  // The largest element of a row's first part. Asked of the next row before this one is finished, so
  // that neither waits for a result: 1.1 times faster at 1,000 classes.
  static A peek(const T* x, int64_t classes) {
    return largest(x, std::min(kChunk, classes), kLowest);
  }

  // A part is summed against the pivot so far; against its own largest element in the rare case that it
  // outweighs the parts before it: raised(first, by how much) then, before the pivot moves. And
  // in any case summed(first, n). `out` is where the row's result goes.
  template <bool Keeps, class Raised, class Summed>
  PYFUSED_INLINE void read(const T* row, T* out, int64_t classes, A peeked, const Raised& raised,
                           const Summed& summed) {
    for_parts(classes, [&](int64_t part, int64_t first, int64_t n) {
      const T* const x = row + first;
      A* const e = Keeps ? kept + first : nullptr;
      T* const result = Keeps ? out + first : nullptr;
      A terms = part ? sum_exponentials<Keeps, true>(x, pivot, e, result, n) : 0;
      if (!part || !(terms <= std::min(8 * sum, kMost))) {
        const A high = part ? largest(x, n, pivot) : peeked;
        // While all is -inf the shift is 0, so that a NaN is the only way to a NaN.
        const A shift = high == kLowest ? A(0) : high;
        sum *= exp_shifted(pivot - shift);
        if (part) raised(first, double(high - pivot));
        pivot = high;
        terms = sum_exponentials<Keeps, false>(x, shift, e, result, n);
      }
      if (Keeps) pivots[part] = pivot;
      sum += terms;
      summed(first, n);
    });
  }

  // What makes of the kept exponentials of a part those against the last pivot.
  double rescale(int64_t part) const {
    return pivots[part] == pivot ? 1 : exp_shifted(pivots[part] - pivot);
  }
};

}  // namespace pyfused
