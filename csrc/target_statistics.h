// Counts the class indices of a batch and checks them, before a loss is computed.
#pragma once

#include <algorithm>
#include <vector>

#include "cross_entropy_terms.h"
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
  if (!ce.target) {
    Sum weights;
    for (int64_t i = 0; ce.token_weights && i < ce.positions(); ++i)
      weights.add(ce.token_weights[i]);
    return {ce.token_weights ? weights.value() : double(ce.positions()), -1};
  }
  constexpr int64_t kBlock = 8192;
  std::vector<TargetStatistics> parts((ce.positions() + kBlock - 1) / kBlock, {0, -1});
  const auto run = [&](int64_t first, int64_t end, auto) {
    int64_t not_ignored = 0, invalid = 0;
    for (int64_t i = first; i < end; ++i) {
      const int64_t counted = ce.target[i] != ce.ignore_index;
      not_ignored += counted;
      invalid += counted & int64_t(uint64_t(ce.target[i]) >= uint64_t(ce.classes));
    }
    TargetStatistics& part = parts[first / kBlock];
    part.denominator = double(not_ignored);
    for (int64_t i = first; invalid && part.out_of_range < 0; ++i) {
      const bool outside = ce.target[i] < 0 || ce.target[i] >= ce.classes;
      if (ce.target[i] != ce.ignore_index && outside) part.out_of_range = i;
    }
    if (invalid || !(ce.weight || ce.token_weights)) return;
    Sum weights;
    for (int64_t i = first; i < end; ++i) {
      if (ce.ignored(i)) continue;
      const double weight = ce.weight ? double(ce.weight[ce.target[i]]) : 1;
      weights.add(ce.token_weights ? weight * double(ce.token_weights[i]) : weight);
    }
    part.denominator = weights.value();
  };
  for_blocks<NoBuffers>(ce.positions(), kBlock, ce.threads, run);
  Sum denominator;
  int64_t out_of_range = -1;
  for (const TargetStatistics& part : parts) {
    denominator.add(part.denominator);
    if (out_of_range < 0) out_of_range = part.out_of_range;
  }
  return {denominator.value(), out_of_range};
}

}  // namespace pyfused
