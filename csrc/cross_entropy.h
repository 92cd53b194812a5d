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
    const int64_t o = outer == 1 ? 0 : position / inner;  // a division costs as much as a vector
    return view.data + o * view.outer + (position - o * inner) * view.inner;
  }
};

// The rows of one block, whatever the layout, scale their gradient by upstream * normalizer and add
// their loss to one partial sum.
template <class T> struct Scaled : CrossEntropy<T> {
  using A = Accumulate<T>;
  double uniform_mass;  // uniform * sum_c weight_c
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
    find_normalizer();
    const double loss = ce.dense() ? dense_loss() : sparse_loss();
    if (ce.grad_logits.data) write_gradient();
    if (ce.grad_probabilities.data) write_probability_gradient();
    return loss;
  }

 private:
  const Scaled<T>& ce;
  const int64_t position;
  const T* const logits;
  A mass;  // sum_c q_c
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
      if constexpr (kWidensInBulk<T>) {
        alignas(kVectorBytes) A wide[kChunk];
        load(logits + first, wide, whole);
        if (whole) body(first, static_cast<const A*>(wide), whole);
      } else {
        if (whole) body(first, logits + first, whole);
      }
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

  // q of a chunk; the padding holds zeros.
  void load_aim(int64_t first, int64_t padded) {
    const A keep = ce.keep(), uniform = ce.uniform();
    const int64_t n = std::min(padded, ce.classes - first);
    std::fill_n(q, padded, A(0));
    if (!ce.target) {
      const int64_t stride = ce.probabilities.classes;
      load(ce.at(ce.probabilities, position) + first * stride, stride, q, n);
    }
    if (ce.weight) {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(ce.weight[first + i], q[i], keep, uniform);
    } else {
      for (int64_t i = 0; i < n; ++i) q[i] = aim(A(1), q[i], keep, uniform);
    }
    const int64_t hit = ce.target ? ce.target[position] - first : -1;
    if (hit >= 0 && hit < n) q[hit] += ce.spike(position);
  }

  double sparse_loss() {
    mass = ce.spike(position);
    return mass * (log_sum + double(max - widen(logits[ce.target[position]])));
  }

  double dense_loss() {
    double loss = 0, aimed = 0;
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
    mass = ce.target ? A(ce.uniform_mass + ce.spike(position)) : A(aimed);
    return loss;
  }

  // Inlined, this loop is one that GCC 12 leaves scalar for double (13 times slower).
  template <class U>
  PYFUSED_NOINLINE static void scaled_exp(const U* x, A* out, int64_t padded, A pivot, A factor) {
    const int64_t n = padded / kLanes<A> * kLanes<A>;
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive(widen(x[i]) - pivot) * factor;
  }

  void write_gradient() {
    T* const grad = ce.at(ce.grad_logits, position);
    const A high = max, scale = ce.scale(position), share = A(mass / sum);
    if (ce.dense()) {
      for_chunks([&](int64_t first, auto* x, int64_t padded) {
        A* const out = staged_chunk(grad, first, padded);
        load_aim(first, padded);
        PYFUSED_SIMD()
        for (int64_t i = 0; i < padded; ++i) {
          out[i] = (exp_nonpositive(widen(x[i]) - high) * share - q[i]) * scale;
        }
        store(out, grad + first, std::min(padded, ce.classes - first));
      });
      return;
    }
    const A factor = share * scale;
    for_chunks([&](int64_t first, auto* x, int64_t padded) {
      A* const out = staged_chunk(grad, first, padded);
      scaled_exp(x, out, padded, high, factor);
      store(out, grad + first, std::min(padded, ce.classes - first));
    });
    const int64_t hit = ce.target[position];
    grad[hit] = narrow<T>((exp_nonpositive(widen(logits[hit]) - high) * share - mass) * scale);
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
      store(out, grad + first * stride, stride, n);
    });
  }
};

// ---- columns: positions lie side by side or classes are few, vectors run along positions --------

constexpr int64_t kColumns = 32;          // positions at a time
constexpr int64_t kColumnClasses = 128;  // classes at a time: a tile stays in L1

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
    }
    find_normalizer();
    ce.dense() ? find_dense_loss() : find_sparse_loss();
    if (ce.grad_logits.data) write_gradient();
    if (ce.grad_probabilities.data) write_probability_gradient();
    Sum total;
    for (int64_t b = 0; b < n; ++b) {
      if (ce.ignored(first + b)) loss[b] = 0;
      total.add(loss[b]);
    }
    if (ce.loss && ce.reduction == Reduction::none) std::copy_n(loss, n, ce.loss + first);
    return total.value();
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
      [[maybe_unused]] alignas(kVectorBytes) A line[kColumnClasses];
      for (int64_t b = 0; b < n; ++b) {
        const T* const from = ce.at(view, first + b) + c * view.classes;
        if constexpr (std::is_same_v<T, A>) {
          for (int64_t i = 0; i < k; ++i) tile[i][b] = from[i * view.classes];
        } else {
          load(from, view.classes, line, k);
          for (int64_t i = 0; i < k; ++i) tile[i][b] = line[i];
        }
      }
    }
    for (int64_t i = 0; n < kColumns && i < k; ++i) std::fill(tile[i] + n, tile[i] + kColumns, A(0));
  }

  void store_tile(const Tile& tile, const View<T>& view, int64_t c, int64_t k) const {
    if (side_by_side(view)) {
      T* to = ce.at(view, first) + c * view.classes;
      for (int64_t i = 0; i < k; ++i) write(tile[i], to + i * view.classes, n, ce.streams);
    } else {
      [[maybe_unused]] alignas(kVectorBytes) A line[kColumnClasses];
      for (int64_t b = 0; b < n; ++b) {
        T* const to = ce.at(view, first + b) + c * view.classes;
        if constexpr (std::is_same_v<T, A>) {
          for (int64_t i = 0; i < k; ++i) to[i * view.classes] = tile[i][b];
        } else {
          for (int64_t i = 0; i < k; ++i) line[i] = tile[i][b];
          store(line, to, view.classes, k);
        }
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

  // Sums are taken in groups of a few classes, so that rounding errors grow with neither.
  template <class Body> static void for_groups(int64_t k, const Body& body) {
    for (int64_t i = 0; i < k; i += 8) body(i, std::min(i + 8, k));
  }

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
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) part[b] += exp_nonpositive(x[i][b] - pivot[b]);
        }
        for (int64_t b = 0; b < kColumns; ++b) sum[b] += part[b];
      });
    });
    for (int64_t b = 0; b < kColumns; ++b) {
      sum[b] = max[b] == lowest ? std::numeric_limits<A>::quiet_NaN() : sum[b];
      log_sum[b] = log_positive(sum[b]);
    }
  }

  void load_aim(int64_t c, int64_t k) {
    const A keep = ce.keep(), uniform = ce.uniform();
    if (!ce.target) load_tile(ce.probabilities, c, k, q);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = ce.weight ? ce.weight[c + i] : A(1);
      for (int64_t b = 0; b < kColumns; ++b) {
        q[i][b] = aim(weight, ce.target ? A(0) : q[i][b], keep, uniform);
      }
    }
    for_hits(c, k, [&](int64_t i, int64_t b) { q[i][b] += spike[b]; });
  }

  // Calls body(class in the tile, position in the block) for the targets within the tile.
  template <class Body> void for_hits(int64_t c, int64_t k, const Body& body) {
    for (int64_t b = 0; ce.target && b < n; ++b) {
      if (hit[b] >= c && hit[b] < c + k) body(hit[b] - c, b);
    }
  }

  void find_dense_loss() {
    std::fill_n(loss, kColumns, A(0));
    std::fill_n(mass, kColumns, A(0));
    for_tiles([&](int64_t c, int64_t k) {
      load_aim(c, k);
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {}, aimed[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) {
            part[b] += q[i][b] * ((max[b] - x[i][b]) + log_sum[b]);
            aimed[b] += q[i][b];
          }
        }
        for (int64_t b = 0; b < kColumns; ++b) {
          loss[b] += part[b];
          mass[b] += aimed[b];
        }
      });
    });
    for (int64_t b = 0; ce.target && b < n; ++b) mass[b] = A(ce.uniform_mass + spike[b]);
  }

  void find_sparse_loss() {
    for (int64_t b = 0; b < kColumns; ++b) {
      mass[b] = spike[b];
      loss[b] = 0;
      if (hit[b] < 0) continue;
      const A logit = widen(ce.at(ce.logits, first + b)[hit[b] * ce.logits.classes]);
      loss[b] = spike[b] * (log_sum[b] + (max[b] - logit));
    }
  }

  void write_gradient() {
    const bool dense = ce.dense();
    alignas(kVectorBytes) A share[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) share[b] = mass[b] / sum[b];
    for_tiles([&](int64_t c, int64_t k) {
      if (dense) load_aim(c, k);
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) x[i][b] = exp_nonpositive(x[i][b] - max[b]) * share[b];
        for (int64_t b = 0; dense && b < kColumns; ++b) x[i][b] -= q[i][b];
      }
      if (!dense) for_hits(c, k, [&](int64_t i, int64_t b) { x[i][b] -= spike[b]; });
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) x[i][b] *= scale[b];
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
  Sum weights;
  for (int64_t c = 0; ce.weight && c < ce.classes; ++c) weights.add(ce.weight[c]);
  const double uniform_mass = ce.uniform() * (ce.weight ? weights.value() : double(ce.classes));
  const Scaled<T> scaled{ce, uniform_mass, A(1 / denominator), bytes >= kStreamBytes};

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
    Sum sum;
    for (int64_t i = first; i < std::min(ce.positions(), first + size); ++i) {
      const double loss = Row<T>(scaled, i).run();
      if (ce.loss && each) ce.loss[i] = A(loss);
      sum.add(loss);
    }
    partial[block] = sum.value();
  });
  if (ce.loss && !each) *ce.loss = A(total(partial) / denominator);
  return -1;
}

}  // namespace pyfused
