// Cross-entropy of one position whose classes lie side by side: vectors run along the classes.
#pragma once

#include <algorithm>
#include <limits>

#include "cross_entropy_terms.h"
#include "parallel.h"

namespace pyfused {

// From this many classes on a row fills enough vectors of its own; below, positions share vectors.
constexpr int64_t kRowClasses = 128;
constexpr int64_t kChunk = 1024;  // classes at a time: the buffers of a chunk stay in L1

template <class T> class Row {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

 public:
  Row(const Scaled<T>& ce, int64_t position)
      : ce(ce), position(position), logits(ce.at(ce.logits, position)) {}

  // Returns the loss; writes the gradients that are wanted.
  double run() {
    if (ce.ignored(position)) {
      if (ce.grad_logits.data) std::fill_n(ce.at(ce.grad_logits, position), ce.classes, T{});
      return 0;
    }
    find_normalizer();
    double loss;
    if (ce.dense()) {
      loss = dense_loss(0);
      if (std::isnan(loss)) loss = dense_loss(log_sum);  // an infinite weight times no distance
    } else {
      mass = ce.spike(position);
      loss = spike_loss(log_sum);
    }
    if (ce.grad_logits.data) write_gradient();
    if (ce.grad_probabilities.data) write_probability_gradient();
    return loss;
  }

 private:
  const Scaled<T>& ce;
  const int64_t position;
  const T* const logits;
  double mass;  // sum_c q_c
  A max = kLowest;
  double sum = 0, log_sum = 0;  // of exp(x - max)
  alignas(kVectorBytes) A q[kChunk];
  alignas(kVectorBytes) A buffer[kChunk];

  // Where a chunk's gradient is computed; the padding of the last vector has no place in `grad`.
  A* staged_chunk(T* grad, int64_t first, int64_t padded) {
    return first + padded <= ce.classes ? staged(grad + first, buffer) : buffer;
  }

  // Calls body(first, x, n) on whole vectors of logits; the last one is padded with -inf.
  template <class Body> void for_chunks(const Body& body) {
    for (int64_t first = 0; first < ce.classes; first += kChunk) {
      const int64_t n = std::min(kChunk, ce.classes - first);
      const int64_t direct = kWidensInBulk<T> ? 0 : n / kLanes<A> * kLanes<A>;
      if (direct) body(first, logits + first, direct);
      if (direct == n) continue;
      alignas(kVectorBytes) A wide[kWidensInBulk<T> ? kChunk : kLanes<A>];
      const int64_t rest = n - direct, padded = whole_vectors<A>(rest);
      load(logits + first + direct, wide, rest);
      std::fill(wide + rest, wide + padded, kLowest);
      body(first + direct, static_cast<const A*>(wide), padded);
    }
  }

  // One read of the row: a chunk is summed against the largest logit so far, and once more in the
  // rare case that it holds a larger one.
  void find_normalizer() {
    for_chunks([&](int64_t, auto* x, int64_t n) {
      A high = max, part = 0;
      if (max != kLowest) {
        const A pivot = max;
        PYFUSED_SIMD(reduction(+ : part) reduction(max : high))
        for (int64_t i = 0; i < n; ++i) {
          const A logit = widen(x[i]);
          high = logit > high ? logit : high;
          part += exp_nonpositive(logit - pivot);
        }
      } else {
        PYFUSED_SIMD(reduction(max : high))
        for (int64_t i = 0; i < n; ++i) high = widen(x[i]) > high ? widen(x[i]) : high;
      }
      if (high > max || max == kLowest) {
        // While all is -inf the pivot is 0, so that a NaN is the only way to a NaN.
        const A pivot = high == kLowest ? A(0) : high;
        sum *= exp_nonpositive(max - pivot);
        max = high;
        part = 0;
        PYFUSED_SIMD(reduction(+ : part))
        for (int64_t i = 0; i < n; ++i) part += exp_nonpositive(widen(x[i]) - pivot);
      }
      sum += part;
    });
    log_sum = std::log(sum);
  }

  // q / level of a chunk, but for the spike; the padding holds zeros.
  void load_aim(int64_t first, int64_t padded) {
    const A slope = ce.slope(), offset = ce.offset();
    const int64_t n = std::min(padded, ce.classes - first);
    std::fill_n(q, padded, A(0));
    if (!ce.target) {
      const int64_t stride = ce.probabilities.classes;
      load(ce.at(ce.probabilities, position) + first * stride, stride, q, n);
    }
    if (ce.weight) {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(ce.weight[first + i], q[i], slope, offset);
    } else {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(A(1), q[i], slope, offset);
    }
  }

  // sum_c q_c (lse - x_c), with shift + rest = log_sum: a shift of 0 takes log_sum out of the sum.
  double dense_loss(double shift) {
    Sum loss, aimed;
    const A high = max, low = A(shift);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      load_aim(first, padded);
      const int64_t n = std::min(padded, ce.classes - first);  // 0 * inf is no part of the loss
      add_terms<A>(loss, n, [=](int64_t i) { return q[i] * ((high - widen(x[i])) + low); });
      if (!ce.target) add_terms<A>(aimed, n, [=](int64_t i) { return q[i]; });
    });
    mass = ce.target ? ce.uniform_mass + ce.spike(position) : ce.level() * aimed.value();
    const double rest = shift == 0 ? mass * log_sum : 0;
    return ce.level() * loss.value() + (ce.target ? spike_loss(shift) : 0) + rest;
  }

  double spike_loss(double shift) const {
    const A logit = widen(logits[ce.target[position]]);
    return ce.spike(position) * (double(max - logit) + shift);
  }

  // exp(x - pivot) factor, less q level where Dense. Inlined, this loop is one that GCC 12 leaves scalar
  // for double (13 times slower).
  template <bool Dense, class U>
  PYFUSED_NOINLINE static void gradient(const U* x, const A* q, A* out, int64_t padded, A pivot,
                                        A factor, A level) {
    const int64_t n = padded / kLanes<A> * kLanes<A>;
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      const A p = exp_nonpositive(widen(x[i]) - pivot) * factor;
      out[i] = Dense ? p - q[i] * level : p;
    }
  }

  void write_gradient() {
    T* const grad = ce.at(ce.grad_logits, position);
    const double scale = ce.scale(position);
    const A high = max, factor = A(mass * scale / sum), level = A(ce.level() * scale);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      A* const out = staged_chunk(grad, first, padded);
      if (ce.dense()) {
        load_aim(first, padded);
        gradient<true>(x, q, out, padded, high, factor, level);
      } else {
        gradient<false>(x, q, out, padded, high, factor, level);
      }
      store(out, grad + first, std::min(padded, ce.classes - first));
    });
    if (!ce.target) return;
    const int64_t hit = ce.target[position];
    const double p = double(exp_nonpositive(widen(logits[hit]) - high)) / sum;
    grad[hit] = narrow<T>(A((p * mass - ce.hit_aim(position)) * scale));
  }

  void write_probability_gradient() {
    T* const grad = ce.at(ce.grad_probabilities, position);
    const int64_t stride = ce.grad_probabilities.classes;
    const A factor = A(ce.level() * ce.slope() * ce.scale(position)), high = max, log_sum = A(this->log_sum);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      const int64_t n = std::min(padded, ce.classes - first);
      A* const out = stride == 1 ? staged_chunk(grad, first, padded) : buffer;
      for (int64_t i = 0; i < n; ++i) out[i] = factor * ((high - widen(x[i])) + log_sum);
      for (int64_t i = 0; ce.weight && i < n; ++i) out[i] *= ce.weight[first + i];
      store(out, grad + first * stride, stride, n);
    });
  }
};

}  // namespace pyfused
