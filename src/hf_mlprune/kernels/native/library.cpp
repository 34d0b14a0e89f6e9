// The operation `hf_mlprune::block_sparse_linear`, on torch's stable ABI: one shared object for every
// torch from 2.10 up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "product.h"

// What shared_ptr asks where the C library has it, from glibc 2.32 up. Our own lets the library load with older ones;
// 0 says that there may be several threads.
extern "C" {
[[gnu::visibility("hidden")]] char __libc_single_threaded = 0;
}

namespace mlprune {
namespace {

using torch::stable::Tensor;
namespace boxed = torch::stable::detail;

struct Delete {
  void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
};
// Without the shared ownership of torch::stable::Tensor, which is felt at one token.
using Owned = std::unique_ptr<AtenTensorOpaque, Delete>;

// The first arguments, which are tensors and become the callee's.
template <size_t N>
std::array<Owned, N> take(const StableIValue* stack) {
  std::array<Owned, N> tensors;
  for (size_t i = 0; i < N; ++i) tensors[i].reset(boxed::to<AtenTensorHandle>(stack[i]));
  return tensors;
}

// What is asked of a tensor here. At one token each question to torch is felt.
class Array : public Shape {
 public:
  explicit Array(const Owned& tensor) : handle(tensor.get()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    int64_t* first;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &first));
    sizes = first;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    check_sizes();
    check(data || has_zero(), "expected tensors with memory, got one whose storage was freed");
  }

  bool is_list_of(int32_t type, int64_t count) const {
    return is_list(count) && dtype == type && (count < 2 || strides[0] == 1);
  }

  Tensor tensor() const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return Tensor(copy);
  }

  const AtenTensorHandle handle;
  int64_t* strides;
  int32_t dtype;
  void* data;
};

// Offsets of the tokens of x, (..., columns), whose leading dimensions have any strides.
std::vector<int64_t> token_offsets(const Array& x, int64_t tokens) {
  std::vector<int64_t> offsets(tokens, 0);
  int64_t inner = 1;
  for (int64_t d = x.dim - 2; d >= 0; --d) {
    for (int64_t t = 0; t < tokens; ++t) offsets[t] += t / inner % x.sizes[d] * x.strides[d];
    inner *= x.sizes[d];
  }
  return offsets;
}

// The one stride that walks all leading dimensions, if there is one. Those of size 1 have strides that mean nothing.
std::optional<int64_t> one_stride(const Array& x) {
  std::optional<int64_t> stride;
  int64_t next = 0;
  for (int64_t d = x.dim - 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    if (stride && x.strides[d] != next) return std::nullopt;
    if (!stride) stride = x.strides[d];
    next = x.strides[d] * x.sizes[d];
  }
  return stride ? stride : 0;
}

// Memory for y, (..., outputs), and its handle. Much of it asks for huge pages: clearing fresh pages of 4 KiB one by
// one would take up to half of the time at low densities.
Owned make_output(const Array& x, Product& p) {
  constexpr int64_t kMost = 64;
  check(x.dim <= kMost, "x: expected at most ", kMost, " dimensions, got ", x.dim);
  int64_t sizes[kMost], strides[kMost], stride = 1;
  for (int64_t d = x.dim - 1; d >= 0; --d) {
    sizes[d] = d == x.dim - 1 ? p.outputs : x.sizes[d];
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(x.dim, sizes, strides, x.dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Owned y(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &p.y));
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p.y);
  const uintptr_t end = begin + p.tokens * p.outputs * (p.bfloat16 ? 2 : 4);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  // Advice only: where it is refused, nothing is lost.
  if (end >= first + kHuge)
    madvise(reinterpret_cast<void*>(first), (end - first) / kHuge * kHuge, MADV_HUGEPAGE);
  return y;
}

// y = act(x W^T + b); W is as wide as x. With `places`, (rows,), row r is written to place places[r] of `outputs`.
AtenTensorHandle multiply_arrays(
    const Array& x, const Array& values, const Array& crow, const Array& col, const Array& bias,
    const Array* places, int64_t outputs, int64_t activation, int64_t instruction_set) {
  const InstructionSet& set = find_instruction_set(instruction_set);
  Product p{};
  p.bfloat16 = x.dtype == aoti_torch_dtype_bfloat16();
  check(p.bfloat16 || x.dtype == aoti_torch_dtype_float32(), "x: expected float32 or bfloat16");
  check(values.dtype == x.dtype, "values: expected the dtype of x");
  check(bias.dtype == x.dtype, "bias: expected (rows,) of the dtype of x");
  set_sizes(p, x, values, bias, outputs, activation);
  const int64_t blocks = values.sizes[0];
  p.column_stride = x.strides[x.dim - 1];
  check(
      crow.is_list_of(aoti_torch_dtype_int32(), count_grid_rows(p) + 1),
      "crow_indices: expected contiguous int32 (grid rows + 1,)");
  check(
      col.is_list_of(aoti_torch_dtype_int32(), blocks), "col_indices: expected contiguous int32, one entry per block");
  check(
      !places || places->is_list_of(aoti_torch_dtype_int64(), p.rows),
      "row_indices: expected contiguous int64, one place per row");
  p.crow = static_cast<const int32_t*>(crow.data);
  p.col = static_cast<const int32_t*>(col.data);
  if (places) p.row_places = static_cast<const int64_t*>(places->data);
  check_structure(p, blocks);

  std::vector<int64_t> offsets;
  if (const std::optional<int64_t> stride = one_stride(x)) {
    p.row_stride = *stride;
  } else {
    offsets = token_offsets(x, p.tokens);
    p.row_offsets = offsets.data();
  }
  // The stride of a dimension of size 1 may be anything.
  const bool is_contiguous = blocks == 0 || ((blocks == 1 || values.strides[0] == p.block_rows * p.block_columns) &&
                                             (p.block_columns == 1 || values.strides[1] == p.block_rows) &&
                                             (p.block_rows == 1 || values.strides[2] == 1));
  std::optional<Tensor> own_values, own_bias;
  if (!is_contiguous) own_values = torch::stable::contiguous(values.tensor());
  if (p.rows > 1 && bias.strides[0] != 1) own_bias = torch::stable::contiguous(bias.tensor());
  p.x = x.data;
  p.values = own_values ? own_values->data_ptr() : values.data;
  p.bias = own_bias ? own_bias->data_ptr() : bias.data;

  Owned y = make_output(x, p);
  if (p.tokens > 0 && outputs > 0) {
    if (places) std::memset(p.y, 0, p.tokens * outputs * (p.bfloat16 ? 2 : 4));
    if (p.rows > 0)
      share_out(p, set, torch::stable::get_num_threads(), [](int64_t count, const auto& body) {
        torch::stable::parallel_for(0, count, 1, body);
      });
  }
  return y.release();
}

// The overloads, in torch's boxed calling convention: arguments on the stack, which become the callee's.
void block_sparse_linear(StableIValue* stack, uint64_t, uint64_t) {
  const auto tensors = take<5>(stack);
  const Array x(tensors[0]), values(tensors[1]), crow(tensors[2]), col(tensors[3]), bias(tensors[4]);
  stack[0] = boxed::from(multiply_arrays(
      x, values, crow, col, bias, nullptr, bias.dim == 1 ? bias.sizes[0] : 0, boxed::to<int64_t>(stack[5]),
      boxed::to<int64_t>(stack[6])));
}

void block_sparse_linear_scattered(StableIValue* stack, uint64_t, uint64_t) {
  const auto tensors = take<6>(stack);
  const Array x(tensors[0]), values(tensors[1]), crow(tensors[2]), col(tensors[3]), bias(tensors[4]),
      places(tensors[5]);
  stack[0] = boxed::from(multiply_arrays(
      x, values, crow, col, bias, &places, boxed::to<int64_t>(stack[6]), boxed::to<int64_t>(stack[7]),
      boxed::to<int64_t>(stack[8])));
}

// The best instruction set of this processor that there is code for; empty if there is none.
std::string instruction_set() {
  return kInstructionSets[best_instruction_set()].name;
}

}  // namespace
}  // namespace mlprune

STABLE_TORCH_LIBRARY(hf_mlprune, library) {
  library.def(
      "block_sparse_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor bias, "
      "int activation=0, int instruction_set=0) -> Tensor");
  library.def(
      "block_sparse_linear.scattered(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, "
      "Tensor bias, Tensor row_indices, int scatter_size, int activation=0, int instruction_set=0) -> Tensor");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hf_mlprune, CPU, library) {
  library.impl("block_sparse_linear", &mlprune::block_sparse_linear);
  library.impl("block_sparse_linear.scattered", &mlprune::block_sparse_linear_scattered);
}

STABLE_TORCH_LIBRARY_IMPL(hf_mlprune, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&mlprune::instruction_set));
}
