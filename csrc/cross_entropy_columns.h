// Cross-entropy of a block of positions: classes strided, positions contiguous, vectors along
// positions.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "columns.h"
#include "loss_rows.h"

namespace pyfused {

template <class T, int64_t kColumns, int64_t kTileClasses>
class CrossEntropyColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Tile = A[kTileClasses][kColumns];
  using Base::add_lanes, Base::repeat, Base::load_tile, Base::store_tile, Base::for_groups;
  using Base::kFolds, Base::first, Base::fold, Base::positions, Base::length;
  using Base::sum, Base::max, Base::x, Base::e;

 public:
  using Base::positions_of_block;

  CrossEntropyColumns(const CrossEntropyBatch<T>& ce, int64_t first)
      : Base(ce, first, std::min(positions_of_block(ce), ce.positions() - first), ce.streams,
             ce.scale),
        ce(ce) {}

  double run() {
    rows.find_targets(ce, first, positions);
    ce.grad_logits.data || ce.metrics.lse ? Base::template find_normalizer<true>(ce.logits)
                                          : Base::template find_normalizer<false>(ce.logits);
    rows.find_log_sums(sum, kColumns);
    find_target_logits();
    if (ce.dense()) find_distance();
    if (ce.metrics.lse) find_metrics();
    rows.find_terms(ce, positions, max, sum);
    repeat(rows.a);
    repeat(rows.s);
    rows.find_losses(ce, kColumns, max);
    if (ce.grad_probabilities.data) write_probability_gradient();
    if (ce.grad_logits.data) write_gradient();
    return ce.finish(first, positions, rows.loss);
  }

 private:
  const CrossEntropyBatch<T>& ce;
  LossRows<T, kColumns> rows;
  alignas(kVectorBytes) A class_weight[kFolds ? kColumns : 1];
  alignas(kVectorBytes) Tile w;

  template <class Body> void for_tiles(const Body& body) { Base::for_tiles(ce.logits, body); }

  // Called after the logits were read, when they are in the cache.
  void find_target_logits() {
    if (ce.target && length <= kTileClasses) {
      for_targets(0, length,
                  [&](int64_t i, int64_t lane, int64_t b) { rows.target_logit[b] = x[i][lane]; });
      return;
    }
    for (int64_t b = 0; ce.target && b < positions; ++b) {
      if (rows.label[b] < 0) continue;
      const A logit = widen(ce.at(ce.logits, first + b)[rows.label[b] * ce.logits.classes]);
      rows.target_logit[b] = A(ce.scale) * logit;
    }
  }

  void load_weights(int64_t c, int64_t k) {
    const A prob_weight = A(ce.prob_weight), smooth_bias = A(ce.smooth_bias);
    if (!ce.target) load_tile(ce.probabilities, c, k, w);
    for (int64_t i = 0; i < k; ++i) {
      const A of_line = load_class_weights(c + i);
      for (int64_t b = 0; b < kColumns; ++b) {
        const A weight = kFolds && fold > 1 ? class_weight[b] : of_line;
        w[i][b] = soft_target(weight, ce.target ? A(0) : w[i][b], prob_weight, smooth_bias);
      }
    }
  }

  // Finds the weight of each lane's class, 0 where the last line lacks it. Unless lines are folded,
  // returns the weight of all lanes.
  A load_class_weights(int64_t line) {
    if (!kFolds || fold == 1) return ce.weight ? ce.weight[line] : A(1);
    const int64_t classes = std::min(fold, ce.classes - line * fold);
    std::fill_n(class_weight, kColumns, A(1));
    for (int64_t j = 0; ce.weight && j < classes; ++j) {
      std::fill_n(class_weight + j * positions, positions, ce.weight[line * fold + j]);
    }
    std::fill(class_weight + classes * positions, class_weight + kColumns, A(0));
    return 0;
  }

  // Calls body(line in the tile, lane, position in the block) for the targets within the tile.
  template <class Body> void for_targets(int64_t c, int64_t k, const Body& body) {
    for (int64_t b = 0; ce.target && b < positions; ++b) {
      const int64_t i = rows.label[b] - c * fold;
      if (uint64_t(i) >= uint64_t(k * fold)) continue;
      if (kFolds && fold > 1) {
        body(i / fold, i % fold * positions + b, b);
      } else {
        body(i, b, b);
      }
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
    add_lanes(rows.distance);
    add_lanes(weight_sum);
    if (!ce.target) std::copy_n(weight_sum, kColumns, rows.weight_sum);
  }

  // Finds the entropy and the first class with the largest logit of each position.
  PYFUSED_NOINLINE void find_metrics() {
    double weighted[kColumns] = {}, index[kColumns];
    std::fill_n(index, kColumns, double(ce.classes));
    Base::reload_with(-std::numeric_limits<A>::infinity());
    for_tiles([&](int64_t c, int64_t k) {
      alignas(kVectorBytes) A part[kColumns] = {}, line[kColumns];
      std::fill_n(line, kColumns, A(k));
      for (int64_t i = k; i-- > 0;) {  // backwards, so that the first class remains
        if (length > kTileClasses) exponentials(x[i], max, e[i], kColumns);
        for (int64_t b = 0; b < kColumns; ++b) {
          part[b] += e[i][b] == 0 ? A(0) : e[i][b] * (x[i][b] - max[b]);  // 0 * inf is NaN
          line[b] = x[i][b] == max[b] ? A(i) : line[b];
        }
      }
      for (int64_t b = 0; b < kColumns; ++b) {
        weighted[b] += double(part[b]);
        const int64_t lane = kFolds && fold > 1 ? b / positions : 0;
        const int64_t found = (c + int64_t(line[b])) * fold + lane;
        if (line[b] < A(k)) index[b] = std::min(index[b], double(found));
      }
    });
    Base::reload_with(0);
    add_lanes(weighted);
    Base::combine(index, [](double x, double y) { return std::min(x, y); });
    rows.write_metrics(ce, first, positions, max, sum, weighted, index);
  }

  void clear_ignored(Tile& tile, int64_t k) const {
    for (int64_t b = 0; rows.any_ignored && b < Base::n; ++b) {
      if (!ce.ignored(first + b % positions)) continue;
      for (int64_t i = 0; i < k; ++i) tile[i][b] = 0;
    }
  }

  void write_gradient() {
    for_tiles([&](int64_t c, int64_t k) {
      if (ce.dense()) load_weights(c, k);
      if (length > kTileClasses) {
        for (int64_t i = 0; i < k; ++i) exponentials(x[i], max, e[i], kColumns);
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= rows.a[b];
      }
      for (int64_t i = 0; ce.dense() && i < k; ++i) {
        for (int64_t b = 0; b < kColumns; ++b) e[i][b] -= rows.s[b] * w[i][b];
      }
      for_targets(c, k,
                  [&](int64_t i, int64_t lane, int64_t b) { e[i][lane] = rows.at_target[b]; });
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
    repeat(factor);
    for_tiles([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        const A of_line = load_class_weights(c + i);
        for (int64_t b = 0; b < kColumns; ++b) {
          const A weight = kFolds && fold > 1 ? class_weight[b] : of_line;
          w[i][b] = factor[b] * weight * ((max[b] - x[i][b]) + low[b]);
        }
      }
      clear_ignored(w, k);
      store_tile(w, ce.grad_probabilities, c, k);
    });
  }
};

}  // namespace pyfused
