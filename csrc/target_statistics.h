// Counts the class indices of a batch and checks them, before a loss is computed.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy.h"
#include "parallel.h"

namespace pyfused {

// Returns the first of n targets that is neither a class nor ignored, or -1.
inline int64_t invalid_class_index(const int64_t* target, int64_t n, int64_t classes,
                                   int64_t ignore_index) {
  const auto is_invalid = [=](int64_t index) {
    return (index != ignore_index) & (uint64_t(index) >= uint64_t(classes));
  };
  int64_t invalid = 0;
  PYFUSED_SIMD(reduction(+ : invalid))
  for (int64_t i = 0; i < n; ++i) invalid += is_invalid(target[i]);
  return invalid ? std::find_if(target, target + n, is_invalid) - target : -1;
}

struct TargetStatistics {
  double denominator;    // of the mean: the summed weight of the targets that are not ignored
  int64_t out_of_range;  // the first position whose target is not a class, or -1
};

template <class T> TargetStatistics target_statistics(const CrossEntropy<T>& ce) {
  constexpr int64_t kBlock = 8192;
  std::vector<TargetStatistics> parts((ce.positions() + kBlock - 1) / kBlock, {0, -1});
  const auto run = [&](int64_t first, int64_t end, auto) {
    TargetStatistics& part = parts[first / kBlock];
    const int64_t invalid =
        ce.target ? invalid_class_index(ce.target + first, end - first, ce.classes, ce.ignore_index)
                  : -1;
    if (invalid >= 0) return void(part.out_of_range = first + invalid);
    int64_t counted = 0;
    for (int64_t i = first; i < end; ++i) counted += !ce.ignored(i);
    part.denominator = double(counted);
    if (!(ce.target && ce.weight) && !ce.token_weights) return;
    Sum weights;
    for (int64_t i = first; i < end; ++i) {
      if (ce.ignored(i)) continue;
      const double weight = ce.target && ce.weight ? double(ce.weight[ce.target[i]]) : 1;
      weights.add(ce.token_weights ? weight * double(ce.token_weights[i]) : weight);
    }
    part.denominator = weights.value();
  };
  for_blocks<NoBuffers>(ce.positions(), kBlock, ce.threads, run);
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
