// Cross-entropy of a block of positions: classes strided, positions contiguous, vectors along
// positions.
#pragma once

#include <algorithm>

#include "columns.h"
#include "loss_rows.h"

namespace pyfused {

template <class T, int64_t kColumns, int64_t kTileClasses>
class CrossEntropyColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Tile = A[kTileClasses][kColumns];
  using Base::first, Base::n, Base::sum, Base::max, Base::x, Base::e;
  using Base::load_tile, Base::store_tile, Base::for_groups;

 public:
  using Base::kPositions;

  CrossEntropyColumns(const CrossEntropyBatch<T>& ce, int64_t first)
      : Base(ce, first, std::min(kColumns, ce.positions() - first), ce.streams, ce.scale), ce(ce) {}

  double run() {
    rows.find_targets(ce, first, n);
    ce.grad_logits.data ? Base::template find_normalizer<true>(ce.logits)
                        : Base::template find_normalizer<false>(ce.logits);
    rows.find_log_sums(sum, kColumns);
    find_target_logits();
    if (ce.dense()) find_distance();
    rows.find_terms(ce, n, max, sum);
    rows.find_losses(ce, kColumns, max);
    if (ce.grad_probabilities.data) write_probability_gradient();
    if (ce.grad_logits.data) write_gradient();
    return ce.finish(first, n, rows.loss);
  }

 private:
  const CrossEntropyBatch<T>& ce;
  LossRows<T, kColumns> rows;
  alignas(kVectorBytes) Tile w;

  template <class Body> void for_tiles(const Body& body) { Base::for_tiles(ce.logits, body); }

  // Called after the logits were read, when they are in the cache.
  void find_target_logits() {
    if (ce.target && ce.classes <= kTileClasses) {
      for_targets(0, ce.classes, [&](int64_t i, int64_t b) { rows.target_logit[b] = x[i][b]; });
      return;
    }
    for (int64_t b = 0; ce.target && b < n; ++b) {
      if (rows.label[b] < 0) continue;
      const A logit = widen(ce.at(ce.logits, first + b)[rows.label[b] * ce.logits.classes]);
      rows.target_logit[b] = A(ce.scale) * logit;
    }
  }

  void load_weights(int64_t c, int64_t k) {
    const A prob_weight = A(ce.prob_weight), smooth_bias = A(ce.smooth_bias);
    if (!ce.target) load_tile(ce.probabilities, c, k, w);
    for (int64_t i = 0; i < k; ++i) {
      const A weight = ce.weight ? ce.weight[c + i] : A(1);
      for (int64_t b = 0; b < kColumns; ++b) {
        w[i][b] = soft_target(weight, ce.target ? A(0) : w[i][b], prob_weight, smooth_bias);
      }
    }
  }

  // Calls body(class in the tile, position in the block) for the targets within the tile.
  template <class Body> void for_targets(int64_t c, int64_t k, const Body& body) {
    for (int64_t b = 0; ce.target && b < n; ++b) {
      if (uint64_t(rows.label[b] - c) < uint64_t(k)) body(rows.label[b] - c, b);
    }
  }

  void find_distance() {
    alignas(kVectorBytes) A low[kColumns];
    double weight_sum[kColumns] = {};
    std::fill_n(rows.distance, kColumns, 0.0);
    for (int64_t b = 0; b < kColumns; ++b) low[b] = A(rows.log_sum[b]);
    for_tiles([&](int64_t c, int64_t k) {
      load_weights(c, k);
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {}, part_sum[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) {
            part[b] += w[i][b] * ((max[b] - x[i][b]) + low[b]);
            part_sum[b] += w[i][b];
          }
        }
        for (int64_t b = 0; b < kColumns; ++b) {
          rows.distance[b] += double(part[b]);
          weight_sum[b] += double(part_sum[b]);
        }
      });
    });
    if (!ce.target) std::copy_n(weight_sum, kColumns, rows.weight_sum);
  }

  void clear_ignored(Tile& tile, int64_t k) const {
    for (int64_t b = 0; rows.any_ignored && b < n; ++b) {
      if (!ce.ignored(first + b)) continue;
      for (int64_t i = 0; i < k; ++i) tile[i][b] = 0;
    }
  }

  void write_gradient() {
    for_tiles([&](int64_t c, int64_t k) {
      if (ce.dense()) load_weights(c, k);
      if (ce.classes > kTileClasses) {
        for (int64_t i = 0; i < k; ++i) exponentials(x[i], max, e[i], kColumns);
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= rows.a[b];
      }
      for (int64_t i = 0; ce.dense() && i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] -= rows.s[b] * w[i][b];
      }
      for_targets(c, k, [&](int64_t i, int64_t b) { e[i][b] = rows.at_target[b]; });
      clear_ignored(e, k);
      store_tile(e, ce.grad_logits, c, k);
    });
  }

  void write_probability_gradient() {
    const double grad_weight = ce.options.smooth_weight * ce.prob_weight;
    alignas(kVectorBytes) A factor[kColumns], low[kColumns];
    for (int64_t b = 0; b < kColumns; ++b) {
      factor[b] = A(grad_weight * rows.row_scale[b]);
      low[b] = A(rows.log_sum[b]);
    }
    for_tiles([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        const A weight = ce.weight ? ce.weight[c + i] : A(1);
        for (int64_t b = 0; b < kColumns; ++b) {
          w[i][b] = factor[b] * weight * ((max[b] - x[i][b]) + low[b]);
        }
      }
      clear_ignored(w, k);
      store_tile(w, ce.grad_probabilities, c, k);
    });
  }
};

}  // namespace pyfused
