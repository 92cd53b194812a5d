// A recycled block as a DLPack tensor. The structures are the required parts of DLPack 0
// (dmlc.github.io/dlpack).
#pragma once

#include <cstdint>
#include <vector>

#include "recycle.h"

namespace pyfused {

struct DLDataType {
  uint8_t code, bits;  // code: 2 IEEE float, 4 bfloat
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  struct {
    int32_t device_type, device_id;  // device_type: 1 CPU
  } device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

#ifdef PYFUSED_RECYCLES
// A tensor in a recycled block. The thread that drops the last reference returns the block.
struct RecycledTensor {
  DLManagedTensor managed;
  std::vector<int64_t> shape, strides;
  Block block;

  // Null if there is no memory.
  static DLManagedTensor* make(size_t bytes, DLDataType dtype, std::vector<int64_t> shape,
                               std::vector<int64_t> strides) {
    const Block block = Recycler::get().take(bytes);
    if (!block.data) return nullptr;
    auto* made = new RecycledTensor{{}, std::move(shape), std::move(strides), block};
    made->managed.dl_tensor = {
        block.data,           {1, 0}, int32_t(made->shape.size()), dtype, made->shape.data(),
        made->strides.data(), 0};
    made->managed.manager_ctx = made;
    made->managed.deleter = [](DLManagedTensor* managed) {
      auto* self = static_cast<RecycledTensor*>(managed->manager_ctx);
      Recycler::get().give(self->block);
      delete self;
    };
    return &made->managed;
  }
};
#endif

}  // namespace pyfused
