#include <algorithm>
#include <cstring>

#include "cross_entropy.h"
#include "loss_rows.h"
#include "memory.h"
#include "parallel.h"
#include "target_statistics.h"

namespace pyfused {

// Writes zeros, with non-temporal stores if they exceed the cache.
template <class T> void clear(T* data, int64_t n, int threads) {
  const size_t bytes = size_t(n) * sizeof(T);
  [[maybe_unused]] const bool streams = bytes >= kStreamBytes && has_pages(data, bytes);
  for_blocks<NoBuffers>(n, 1 << 16, threads, [=](int64_t first, int64_t end, auto) {
#ifdef __SSE2__
    alignas(kVectorBytes) static constexpr T zeros[kWriteElements] = {};
    for (int64_t i = first; streams && i < end; i += kWriteElements) {
      stream(zeros, data + i, std::min(kWriteElements, end - i));
    }
    if (streams) return;
#endif
    std::memset(data + first, 0, size_t(end - first) * sizeof(T));
  });
}

template <class T> int64_t nll_loss(const CrossEntropy<T>& nll) {
  using A = Accumulate<T>;
  const TargetStatistics statistics = target_statistics(nll);
  if (statistics.out_of_range >= 0) return statistics.out_of_range;
  const bool mean = nll.reduction == Reduction::mean, each = nll.reduction == Reduction::none;
  const CrossEntropyBatch<T> batch(nll, 0, mean ? statistics.denominator : 1, false);
  if (nll.grad_logits.data) {
    clear(nll.grad_logits.data, nll.positions() * nll.classes, nll.threads);
  }
  constexpr int64_t kBlock = 1024;
  const auto run = [&](int64_t first, int64_t end, auto) {
    double loss[kBlock] = {};
    for (int64_t position = first; position < end; ++position) {
      if (nll.ignored(position)) continue;
      const int64_t label = nll.target[position];
      const double weight = nll.weight ? double(nll.weight[label]) : 1;
      if (nll.loss) {
        const T* const x = nll.at(nll.logits, position) + label * nll.logits.classes;
        loss[position - first] = -weight * double(widen(*x));
      }
      if (nll.grad_logits.data) {
        T* const gradient = nll.at(nll.grad_logits, position) + label * nll.grad_logits.classes;
        *gradient = narrow<T>(A(-weight * batch.row_scale(position)));
      }
    }
    return batch.finish(first, end - first, loss);
  };
  const double loss = sum_of_blocks<T, NoBuffers>(nll.positions(), kBlock, nll.threads, run);
  if (nll.loss && !each) *nll.loss = A(loss / batch.denominator);
  return -1;
}

template int64_t nll_loss(const CrossEntropy<float>&);
template int64_t nll_loss(const CrossEntropy<double>&);
template int64_t nll_loss(const CrossEntropy<bfloat16>&);
template int64_t nll_loss(const CrossEntropy<float16>&);

}  // namespace pyfused
