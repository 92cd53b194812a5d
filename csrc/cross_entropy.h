// Cross-entropy of a whole batch: counts the targets, spreads blocks of positions over threads in one
// of two layouts, and adds the losses up in order. The equations are in cross_entropy_terms.h.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy_columns.h"
#include "cross_entropy_rows.h"
#include "memory.h"
#include "parallel.h"

namespace pyfused {

struct Census {
  double denominator;    // of the mean: the weight of all targets that are not ignored
  int64_t out_of_range;  // the first position whose target is no class, or -1
};

template <class T> Census count_targets(const CrossEntropy<T>& ce) {
  if (!ce.target) {
    Sum weights;
    for (int64_t i = 0; ce.token_weights && i < ce.positions(); ++i) weights.add(ce.token_weights[i]);
    return {ce.token_weights ? weights.value() : double(ce.positions()), -1};
  }
  constexpr int64_t kBlock = 8192;
  const int64_t blocks = (ce.positions() + kBlock - 1) / kBlock;
  std::vector<Census> parts(blocks, Census{0, -1});
  parallel_for(blocks, ce.threads, [&](int64_t block) {
    const int64_t end = std::min(ce.positions(), (block + 1) * kBlock);
    int64_t counted = 0, wrong = 0;
    for (int64_t i = block * kBlock; i < end; ++i) {
      const int64_t counts = ce.target[i] != ce.ignore_index;
      counted += counts;
      wrong += counts & int64_t(uint64_t(ce.target[i]) >= uint64_t(ce.shard.all));
    }
    Census& part = parts[block];
    part.denominator = double(counted);
    for (int64_t i = block * kBlock; wrong && part.out_of_range < 0; ++i) {
      const bool outside = ce.target[i] < 0 || ce.target[i] >= ce.shard.all;
      if (!ce.ignored(i) && outside) part.out_of_range = i;
    }
    if (wrong || !(ce.weight || ce.token_weights)) return;
    Sum weights;
    for (int64_t i = block * kBlock; i < end; ++i) {
      if (ce.ignored(i)) continue;
      const double weight = ce.weight ? double(ce.weight[ce.target[i]]) : 1;
      weights.add(ce.token_weights ? weight * double(ce.token_weights[i]) : weight);
    }
    part.denominator = weights.value();
  });
  Sum denominator;
  int64_t out_of_range = -1;
  for (const Census& part : parts) {
    denominator.add(part.denominator);
    if (out_of_range < 0) out_of_range = part.out_of_range;
  }
  return {denominator.value(), out_of_range};
}

// Returns the first position whose target is out of range, with nothing written, or -1.
template <class T> int64_t cross_entropy(const CrossEntropy<T>& ce) {
  using A = Accumulate<T>;
  const Census census = count_targets(ce);
  if (census.out_of_range >= 0) return census.out_of_range;
  const bool mean = ce.reduction == Reduction::mean, each = ce.reduction == Reduction::none;
  const double denominator = mean ? ce.denominator.value_or(census.denominator) : 1;
  const size_t bytes = size_t(ce.positions() * ce.classes) * sizeof(T);
  Sum weights;
  const int64_t classes = ce.lse ? ce.shard.all : ce.classes;
  const A* const weight = ce.lse ? ce.weight : ce.class_weight();
  for (int64_t c = 0; ce.weight && c < classes; ++c) weights.add(weight[c]);
  const double uniform_sum = ce.uniform() * (ce.weight ? weights.value() : double(classes));
  const bool rows = ce.logits.classes == 1 && ce.classes >= kRowClasses<T> &&
                    (!ce.grad_logits.data || ce.grad_logits.classes == 1);
  T* const grad = ce.grad_logits.data;
  bool streams = bytes >= kStreamBytes;
  if (streams && rows) streams = grad != ce.logits.data && has_pages(grad, bytes);
  const Scaled<T> scaled(ce, uniform_sum, denominator, streams);

  using Tall = CrossEntropyColumns<T, 32, 128>;
  using Wide = CrossEntropyColumns<T, 128, kFewClasses>;
  const bool wide = ce.classes <= kFewClasses;
  const int64_t columns = wide ? Wide::kPositions : Tall::kPositions;
  const int64_t size = rows ? rows_of_block(ce.classes) : columns;
  const int64_t blocks = (ce.positions() + size - 1) / size;
  std::vector<double> partial(blocks);
  parallel_for(blocks, ce.threads, [&](int64_t block) {
    const int64_t first = block * size;
    if (rows) {
      partial[block] = run_rows(scaled, first, std::min(ce.positions(), first + size));
    } else {
      partial[block] = wide ? Wide(scaled, first).run() : Tall(scaled, first).run();
    }
  });
  if (ce.loss && !each) *ce.loss = A(total<T>(partial.data(), blocks) / denominator);
  return -1;
}

}  // namespace pyfused
