// Counts the class indices of a batch and checks them, before a loss is computed.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy.h"
#include "parallel.h"

namespace pyfused {

struct ClassIndices {
  int64_t invalid;  // the first index that is neither a class nor ignored, or -1
  int64_t ignored;  // how many are ignored, if all are valid
};

inline ClassIndices check_class_indices(const int64_t* target, int64_t n, int64_t classes,
                                        int64_t ignore_index) {
  const auto is_invalid = [=](int64_t index) {
    return (index != ignore_index) & (uint64_t(index) >= uint64_t(classes));
  };
  int64_t invalid = 0, ignored = 0;
  PYFUSED_SIMD(reduction(+ : invalid, ignored))
  for (int64_t i = 0; i < n; ++i) {
    invalid += is_invalid(target[i]);
    ignored += target[i] == ignore_index;
  }
  return {invalid ? std::find_if(target, target + n, is_invalid) - target : -1, ignored};
}

struct TargetStatistics {
  double denominator;    // of the mean: the summed weight of the targets that are not ignored
  int64_t out_of_range;  // the first position whose target is not a class, or -1
};

// A parallel region takes as long to start as checking 100,000 targets without weights. The calling
// thread therefore checks fewer than that.
template <class T> TargetStatistics target_statistics(const CrossEntropy<T>& ce) {
  constexpr int64_t kBlock = 8192;
  const bool weighted = (ce.target && ce.weight) || ce.token_weight;
  const int64_t work = weighted ? 8 * ce.positions() : ce.positions() / 2;
  std::vector<TargetStatistics> parts((ce.positions() + kBlock - 1) / kBlock, {0, -1});
  const auto run = [&](int64_t first, int64_t end, auto) {
    TargetStatistics& part = parts[first / kBlock];
    ClassIndices checked{-1, 0};
    if (ce.target) {
      checked = check_class_indices(ce.target + first, end - first, ce.classes, ce.ignore_index);
    }
    if (checked.invalid >= 0) return void(part.out_of_range = first + checked.invalid);
    part.denominator = double(end - first - checked.ignored);
    if (!weighted) return;
    Sum weights;
    for (int64_t i = first; i < end; ++i) {
      if (ce.ignored(i)) continue;
      const double weight = ce.target && ce.weight ? double(ce.weight[ce.target[i]]) : 1;
      weights.add(ce.token_weight ? weight * double(ce.token_weight[i]) : weight);
    }
    part.denominator = weights.value();
  };
  for_blocks<NoBuffers>(ce.positions(), kBlock, threads_for(work, ce.threads), run);
  TargetStatistics all{0, -1};
  Sum denominator;
  for (const TargetStatistics& part : parts) {
    denominator.add(part.denominator);
    if (all.out_of_range < 0) all.out_of_range = part.out_of_range;
  }
  all.denominator = denominator.value();
  return all;
}

}  // namespace pyfused
