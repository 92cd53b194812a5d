#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cross_entropy.h"
#include "loss_rows.h"
#include "memory.h"
#include "parallel.h"
#include "target_statistics.h"

namespace pyfused {

// Writes zeros, with non-temporal stores if they exceed the cache.
template <class T> void clear(T* data, int64_t n, [[maybe_unused]] bool streams) {
#ifdef __SSE2__
  alignas(kVectorBytes) static constexpr T zeros[kWriteElements] = {};
  for (int64_t i = 0; streams && i < n; i += kWriteElements) {
    stream(zeros, data + i, std::min(kWriteElements, n - i));
  }
  if (streams) return;
#endif
  std::memset(data, 0, size_t(n) * sizeof(T));
}

// Writes zeros to rows x columns elements, either of which may be contiguous.
template <class T> void clear(T* data, int64_t rows, int64_t row_stride, int64_t columns,
                              int64_t column_stride, bool streams) {
  if (column_stride == 1 && row_stride == columns) return clear(data, rows * columns, streams);
  if (column_stride != 1) {
    std::swap(rows, columns);
    std::swap(row_stride, column_stride);
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* const first = data + row * row_stride;
    if (column_stride == 1) clear(first, columns, streams);
    else
      for (int64_t k = 0; k < columns; ++k) first[k * column_stride] = T{};
  }
}

template <class T> int64_t nll_loss(const CrossEntropy<T>& nll) {
  using A = Accumulate<T>;
  const TargetStatistics statistics = target_statistics(nll);
  if (statistics.out_of_range >= 0) return statistics.out_of_range;
  const bool mean = nll.reduction == Reduction::mean, each = nll.reduction == Reduction::none;
  const CrossEntropyBatch<T> batch(nll, 0, mean ? statistics.denominator : 1, false);
  const View<T> grad = nll.grad_logits;
  const int64_t positions = nll.positions();
  const size_t bytes = size_t(positions * nll.classes) * sizeof(T);
  const bool streams = grad.data && bytes >= kStreamBytes && has_pages(grad.data, bytes);

  // The losses of a group are added up by the thread that finds the last of them. Gradients of many
  // classes are written in smaller blocks, which more threads can share.
  constexpr int64_t kGroup = 1024, kBlockElements = 1 << 16;
  int64_t block = kGroup;
  bool clears = grad.data;  // whether each block clears its gradients
  if (clears && grad.classes != 1 && kGroup * nll.classes > kBlockElements) {
    // Many classes of few positions: the gradients of other blocks are in between.
    clears = false;
    for_blocks<NoBuffers>(
        positions * nll.classes, kBlockElements, nll.threads,
        [=](int64_t first, int64_t end, auto) { clear(grad.data + first, end - first, streams); });
  }
  while (clears && block > 1 && block * nll.classes > kBlockElements) block /= 2;
  const size_t groups = size_t((positions + kGroup - 1) / kGroup);
  std::vector<double> partial(groups);
  std::vector<std::atomic<int64_t>> found(groups);  // the number of losses
  const std::unique_ptr<double[]> losses(block < kGroup ? new double[positions] : nullptr);
  for_blocks<NoBuffers>(positions, block, nll.threads, [&](int64_t first, int64_t end, auto) {
    for (int64_t at = first, n; clears && at < end; at += n) {  // positions with one outer index
      n = std::min(end - at, nll.inner - at % nll.inner);
      clear(nll.at(grad, at), n, grad.inner, nll.classes, grad.classes, streams);
    }
    const int64_t group = first / kGroup, group_first = group * kGroup;
    double losses_of_block[kGroup];
    double* const loss = losses ? losses.get() + group_first : losses_of_block;
    for (int64_t position = first; position < end; ++position) {
      loss[position - group_first] = 0;
      if (nll.ignored(position)) continue;
      const int64_t label = nll.target[position];
      const double weight = nll.weight ? double(nll.weight[label]) : 1;
      if (nll.loss) {
        const T* const x = nll.at(nll.logits, position) + label * nll.logits.classes;
        loss[position - group_first] = -weight * double(widen(*x));
      }
      if (grad.data) {
        T* const gradient = nll.at(grad, position) + label * grad.classes;
        *gradient = narrow<T>(A(-weight * batch.row_scale(position)));
      }
    }
    const int64_t n = std::min(kGroup, positions - group_first);
    if (found[group].fetch_add(end - first) + end - first < n) return;
    partial[group] = batch.finish(group_first, n, loss);
  });
  const double loss = total<T>(partial.data(), int64_t(groups));
  if (nll.loss && !each) *nll.loss = A(loss / batch.denominator);
  return -1;
}

template int64_t nll_loss(const CrossEntropy<float>&);
template int64_t nll_loss(const CrossEntropy<double>&);
template int64_t nll_loss(const CrossEntropy<bfloat16>&);
template int64_t nll_loss(const CrossEntropy<float16>&);

}  // namespace pyfused
