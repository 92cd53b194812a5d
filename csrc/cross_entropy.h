// Cross-entropy and its gradients in one pass over the logits.
//
//   lse     = log sum_c exp(x_c) = max + log sum_c exp(x_c - max)
//   q_c     = weight_c (keep y_c + uniform) + spike [c = target]          what the row aims at
//   loss    = sum_c q_c (lse - x_c)
//   dloss/dx_c = p_c sum_k q_k - q_c,    p_c = exp(x_c - lse)
//   dloss/dy_c = keep weight_c (lse - x_c)
//
//   class index:    keep = 0,             uniform = smoothing / C,  spike = (1 - smoothing) weight_t
//   probabilities:  keep = 1 - smoothing, uniform = smoothing / C,  spike = 0
//
// torch: F.cross_entropy(x, target, weight, ignore_index=..., label_smoothing=..., reduction=...)
//
// Shapes: x is (N, C, d1, ..., dk); a position is one (n, i1, ..., ik) and owns C logits. Bytes: the
// logits are read once from memory and the gradient written once; what is read again is in cache.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "vec.h"

namespace pyfused {

enum class Reduction { none = 0, mean = 1, sum = 2 };

// Strides of a tensor seen as (outer, inner) positions x classes.
template <class T> struct View {
  T* data;
  int64_t outer, inner, classes;
};

template <class T> struct CrossEntropy {
  using A = Accumulate<T>;
  int64_t outer, inner, classes;
  View<const T> logits;
  const int64_t* target;        // one class index a position, or null:
  View<const T> probabilities;  // one distribution a position
  const A* weight;              // one a class, or null for ones
  int64_t ignore_index;
  A smoothing;
  Reduction reduction;
  const A* upstream;  // the loss's gradient: one a position for none, else one; null for ones
  A* loss;            // one a position for none, else one; null where not wanted
  View<T> grad_logits;         // data is null where not wanted
  View<T> grad_probabilities;  // likewise
  int threads;

  int64_t positions() const { return outer * inner; }
  bool dense() const { return target == nullptr || smoothing > 0; }
  A keep() const { return target ? A(0) : A(1) - smoothing; }
  A uniform() const { return smoothing / A(classes); }
  bool ignored(int64_t position) const { return target && target[position] == ignore_index; }
  A spike(int64_t position) const {
    if (!target) return A(0);
    return (A(1) - smoothing) * (weight ? weight[target[position]] : A(1));
  }
  template <class U> U* at(const View<U>& view, int64_t position) const {
    return view.data + position / inner * view.outer + position % inner * view.inner;
  }
};

// The rows of one block, whatever the layout, scale their gradient by upstream * normalizer and add
// their loss to one partial sum.
template <class T> struct Scaled : CrossEntropy<T> {
  using A = Accumulate<T>;
  A normalizer;
  bool streams;  // gradients too large to stay in cache are written past it
  A scale(int64_t position) const {
    if (!this->upstream) return normalizer;
    return normalizer * this->upstream[this->reduction == Reduction::none ? position : 0];
  }
};

template <class A> PYFUSED_INLINE A aim(A weight, A probability, A keep, A uniform) {
  return weight * (keep * probability + uniform);
}

// ---- rows: classes lie side by side, vectors run along them -------------------------------------

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
    spike = mass = ce.spike(position);
    find_normalizer();
    double loss = ce.dense() ? dense_loss() : 0;
    if (ce.target) {
      loss += spike * (log_sum + double(max - widen(logits[ce.target[position]])));
    }
    if (ce.grad_logits.data) write_gradient();
    if (ce.grad_probabilities.data) write_probability_gradient();
    return loss;
  }

 private:
  const Scaled<T>& ce;
  const int64_t position;
  const T* const logits;
  A spike, mass;  // mass: sum_c q_c
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
      const int64_t whole = n / kLanes<A> * kLanes<A>;
      if (whole) body(first, logits + first, whole);
      if (whole == n) continue;
      alignas(kVectorBytes) A tail[kLanes<A>];
      std::fill_n(tail, kLanes<A>, kLowest);
      load(logits + first + whole, tail, n - whole);
      body(first + whole, static_cast<const A*>(tail), kLanes<A>);
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
    if (max == kLowest) sum = std::numeric_limits<double>::quiet_NaN();
    log_sum = std::log(sum);
  }

  // q of a chunk but for the spike; the padding holds zeros.
  void load_aim(int64_t first, int64_t padded) {
    const A keep = ce.keep(), uniform = ce.uniform();
    const int64_t n = std::min(padded, ce.classes - first);
    std::fill_n(q, padded, A(0));
    if (!ce.target) {
      const int64_t stride = ce.probabilities.classes;
      const T* const y = ce.at(ce.probabilities, position) + first * stride;
      if (stride == 1) {
        load(y, q, n);
      } else {
        for (int64_t i = 0; i < n; ++i) q[i] = widen(y[i * stride]);
      }
    }
    if (ce.weight) {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(ce.weight[first + i], q[i], keep, uniform);
    } else {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(A(1), q[i], keep, uniform);
    }
  }

  double dense_loss() {
    double loss = 0, aimed = spike;
    const A high = max, log_sum = A(this->log_sum);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      load_aim(first, padded);
      const int64_t n = std::min(padded, ce.classes - first);  // 0 * inf is no part of the loss
      A part = 0, part_aimed = 0;
      PYFUSED_SIMD(reduction(+ : part, part_aimed))
      for (int64_t i = 0; i < n; ++i) {
        part += q[i] * ((high - widen(x[i])) + log_sum);
        part_aimed += q[i];
      }
      loss += part;
      aimed += part_aimed;
    });
    mass = A(aimed);
    return loss;
  }

  void write_gradient() {
    T* const grad = ce.at(ce.grad_logits, position);
    const A high = max, scale = ce.scale(position);
    const A factor = A(mass * scale / sum);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      A* const out = staged_chunk(grad, first, padded);
      PYFUSED_SIMD()
      for (int64_t i = 0; i < padded; ++i) out[i] = exp_nonpositive(widen(x[i]) - high) * factor;
      if (ce.dense()) {
        load_aim(first, padded);
        for (int64_t i = 0; i < padded; ++i) out[i] -= q[i] * scale;
      }
      const int64_t hit = ce.target ? ce.target[position] - first : -1;
      if (hit >= 0 && hit < padded) out[hit] -= spike * scale;
      store(out, grad + first, std::min(padded, ce.classes - first));
    });
  }

  void write_probability_gradient() {
    T* const grad = ce.at(ce.grad_probabilities, position);
    const int64_t stride = ce.grad_probabilities.classes;
    const A factor = ce.keep() * ce.scale(position), high = max, log_sum = A(this->log_sum);
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      const int64_t n = std::min(padded, ce.classes - first);
      A* const out = stride == 1 ? staged_chunk(grad, first, padded) : buffer;
      for (int64_t i = 0; i < n; ++i) out[i] = factor * ((high - widen(x[i])) + log_sum);
      for (int64_t i = 0; ce.weight && i < n; ++i) out[i] *= ce.weight[first + i];
      if (stride == 1) {
        store(out, grad + first, n);
      } else {
        for (int64_t i = 0; i < n; ++i) grad[(first + i) * stride] = narrow<T>(out[i]);
      }
    });
  }
};

// ---- columns: positions lie side by side or classes are few, vectors run along positions --------

constexpr int64_t kColumns = 64;      // positions at a time
constexpr int64_t kColumnClasses = 32;  // classes at a time: a tile stays in L1

template <class T> class Columns {
  using A = Accumulate<T>;
  using Tile = A[kColumnClasses][kColumns];

 public:
  Columns(const Scaled<T>& ce, int64_t first)
      : ce(ce), first(first), n(std::min(kColumns, ce.positions() - first)) {}

  double run() {
    for (int64_t b = 0; b < kColumns; ++b) {
      const bool live = b < n && !ce.ignored(first + b);
      any_ignored |= b < n && !live;
      hit[b] = live && ce.target ? ce.target[first + b] : -1;
      scale[b] = live ? ce.scale(first + b) : A(0);
      spike[b] = live ? ce.spike(first + b) : A(0);
      mass[b] = spike[b];
      loss[b] = 0;
    }
    find_normalizer();
    if (ce.dense()) add_dense_loss();
    if (ce.target) add_target_loss();
    if (ce.grad_logits.data) write_gradient();
    if (ce.grad_probabilities.data) write_probability_gradient();
    double total = 0;
    for (int64_t b = 0; b < n; ++b) {
      if (ce.ignored(first + b)) loss[b] = 0;
      total += loss[b];
    }
    if (ce.loss && ce.reduction == Reduction::none) std::copy_n(loss, n, ce.loss + first);
    return total;
  }

 private:
  const Scaled<T>& ce;
  const int64_t first, n;
  bool any_ignored = false;
  int64_t hit[kColumns];
  alignas(kVectorBytes) A scale[kColumns];
  alignas(kVectorBytes) A spike[kColumns];
  alignas(kVectorBytes) A mass[kColumns];
  alignas(kVectorBytes) A loss[kColumns];
  alignas(kVectorBytes) A max[kColumns];
  alignas(kVectorBytes) A sum[kColumns];
  alignas(kVectorBytes) A log_sum[kColumns];
  alignas(kVectorBytes) Tile x;
  alignas(kVectorBytes) Tile q;

  template <class U> bool side_by_side(const View<U>& view) const {
    return view.inner == 1 && first % ce.inner + n <= ce.inner;
  }

  void load_tile(const View<const T>& view, int64_t c, int64_t k, Tile& tile) const {
    if (side_by_side(view)) {
      const T* from = ce.at(view, first) + c * view.classes;
      for (int64_t i = 0; i < k; ++i) load(from + i * view.classes, tile[i], n);
    } else {
      for (int64_t b = 0; b < n; ++b) {
        const T* from = ce.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i) tile[i][b] = widen(from[i * view.classes]);
      }
    }
    for (int64_t i = 0; n < kColumns && i < k; ++i) std::fill(tile[i] + n, tile[i] + kColumns, A(0));
  }

  void store_tile(const Tile& tile, const View<T>& view, int64_t c, int64_t k) const {
    if (side_by_side(view)) {
      T* to = ce.at(view, first) + c * view.classes;
      for (int64_t i = 0; i < k; ++i) write(tile[i], to + i * view.classes, n, ce.streams);
    } else {
      for (int64_t b = 0; b < n; ++b) {
        T* to = ce.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i) to[i * view.classes] = narrow<T>(tile[i][b]);
      }
    }
  }

  template <class Body> void for_tiles(const Body& body) {
    for (int64_t c = 0; c < ce.classes; c += kColumnClasses) {
      const int64_t k = std::min(kColumnClasses, ce.classes - c);
      if (ce.classes > kColumnClasses || !loaded) load_tile(ce.logits, c, k, x);
      loaded = true;
      body(c, k);
    }
  }
  bool loaded = false;  // a row that fits one tile is read once

  void find_normalizer() {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    std::fill_n(max, kColumns, lowest);
    std::fill_n(sum, kColumns, A(0));
    alignas(kVectorBytes) A pivot[kColumns];
    for_tiles([&](int64_t, int64_t k) {
      for (int64_t b = 0; b < kColumns; ++b) pivot[b] = max[b];
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) pivot[b] = x[i][b] > pivot[b] ? x[i][b] : pivot[b];
      }
      for (int64_t b = 0; b < kColumns; ++b) {
        const A previous = max[b];
        max[b] = pivot[b];
        pivot[b] = pivot[b] == lowest ? A(0) : pivot[b];
        sum[b] *= exp_nonpositive(previous - pivot[b]);
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) sum[b] += exp_nonpositive(x[i][b] - pivot[b]);
      }
    });
    for (int64_t b = 0; b < kColumns; ++b) {
      sum[b] = max[b] == lowest ? std::numeric_limits<A>::quiet_NaN() : sum[b];
      log_sum[b] = log_positive(sum[b]);
    }
  }

  // q of a tile but for the spike.
  void load_aim(int64_t c, int64_t k) {
    const A keep = ce.keep(), uniform = ce.uniform();
    if (!ce.target) load_tile(ce.probabilities, c, k, q);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = ce.weight ? ce.weight[c + i] : A(1);
      for (int64_t b = 0; b < kColumns; ++b) {
        q[i][b] = aim(weight, ce.target ? A(0) : q[i][b], keep, uniform);
      }
    }
  }

  void add_dense_loss() {
    for_tiles([&](int64_t c, int64_t k) {
      load_aim(c, k);
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) {
          loss[b] += q[i][b] * ((max[b] - x[i][b]) + log_sum[b]);
          mass[b] += q[i][b];
        }
      }
    });
  }

  void add_target_loss() {
    for (int64_t b = 0; b < n; ++b) {
      if (hit[b] < 0) continue;
      const A logit = widen(ce.at(ce.logits, first + b)[hit[b] * ce.logits.classes]);
      loss[b] += spike[b] * (log_sum[b] + (max[b] - logit));
    }
  }

  void write_gradient() {
    alignas(kVectorBytes) A factor[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) factor[b] = mass[b] * scale[b] / sum[b];
    for_tiles([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) {
          x[i][b] = exp_nonpositive(x[i][b] - max[b]) * factor[b];
        }
      }
      if (ce.dense()) {
        load_aim(c, k);
        for (int64_t i = 0; i < k; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) x[i][b] -= q[i][b] * scale[b];
        }
      }
      for (int64_t b = 0; ce.target && b < n; ++b) {
        if (hit[b] >= c && hit[b] < c + k) x[hit[b] - c][b] -= spike[b] * scale[b];
      }
      for (int64_t b = 0; any_ignored && b < n; ++b) {
        if (!ce.ignored(first + b)) continue;
        for (int64_t i = 0; i < k; ++i) x[i][b] = 0;
      }
      store_tile(x, ce.grad_logits, c, k);
    });
    loaded = false;
  }

  void write_probability_gradient() {
    const A keep = ce.keep();
    for_tiles([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        const A weight = ce.weight ? ce.weight[c + i] : A(1);
        for (int64_t b = 0; b < kColumns; ++b) {
          q[i][b] = keep * scale[b] * weight * ((max[b] - x[i][b]) + log_sum[b]);
        }
      }
      store_tile(q, ce.grad_probabilities, c, k);
    });
  }
};

// ---- the whole batch ----------------------------------------------------------------------------

struct Census {
  double denominator;    // of the mean: the weight of all targets that are not ignored
  int64_t out_of_range;  // the first position whose target is no class, or -1
};

template <class T> Census count_targets(const CrossEntropy<T>& ce) {
  if (!ce.target) return {double(ce.positions()), -1};
  constexpr int64_t kBlock = 8192;
  const int64_t blocks = (ce.positions() + kBlock - 1) / kBlock;
  std::vector<Census> parts(blocks, Census{0, -1});
  parallel_for(blocks, ce.threads, [&](int64_t block) {
    const int64_t end = std::min(ce.positions(), (block + 1) * kBlock);
    int64_t counted = 0, wrong = 0;
    for (int64_t i = block * kBlock; i < end; ++i) {
      const int64_t counts = ce.target[i] != ce.ignore_index;
      counted += counts;
      wrong += counts & int64_t(uint64_t(ce.target[i]) >= uint64_t(ce.classes));
    }
    Census& part = parts[block];
    part.denominator = double(counted);
    for (int64_t i = block * kBlock; wrong && part.out_of_range < 0; ++i) {
      const bool outside = ce.target[i] < 0 || ce.target[i] >= ce.classes;
      if (!ce.ignored(i) && outside) part.out_of_range = i;
    }
    if (wrong || !ce.weight) return;
    part.denominator = 0;
    for (int64_t i = block * kBlock; i < end; ++i) {
      if (!ce.ignored(i)) part.denominator += ce.weight[ce.target[i]];
    }
  });
  Census all{0, -1};
  for (const Census& part : parts) {
    all.denominator += part.denominator;
    if (all.out_of_range < 0) all.out_of_range = part.out_of_range;
  }
  return all;
}

// Returns the first position whose target is out of range, with nothing written, or -1.
template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce) {
  using A = Accumulate<T>;
  const Census census = count_targets(ce);
  if (census.out_of_range >= 0) return census.out_of_range;
  const bool mean = ce.reduction == Reduction::mean, each = ce.reduction == Reduction::none;
  const double denominator = mean ? census.denominator : 1;
  const size_t bytes = size_t(ce.positions() * ce.classes) * sizeof(T);
  const Scaled<T> scaled{ce, A(1 / denominator), bytes >= kStreamBytes};

  const bool rows = ce.logits.classes == 1 && ce.classes >= kRowClasses &&
                    (!ce.grad_logits.data || ce.grad_logits.classes == 1);
  const int64_t size = rows ? std::max<int64_t>(1, 16384 / ce.classes) : kColumns;
  const int64_t blocks = (ce.positions() + size - 1) / size;
  std::vector<double> partial(blocks);
  parallel_for(blocks, ce.threads, [&](int64_t block) {
    const int64_t first = block * size;
    if (!rows) {
      partial[block] = Columns<T>(scaled, first).run();
      return;
    }
    for (int64_t i = first; i < std::min(ce.positions(), first + size); ++i) {
      const double loss = Row<T>(scaled, i).run();
      if (ce.loss && each) ce.loss[i] = A(loss);
      partial[block] += loss;
    }
  });
  if (ce.loss && !each) {
    double total = 0;
    for (const double part : partial) total += part;
    *ce.loss = A(total / denominator);
  }
  return -1;
}

}  // namespace pyfused
