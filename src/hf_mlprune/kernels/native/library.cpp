// The operation `hf_mlprune::block_sparse_linear`, on torch's stable ABI: one shared object for every
// torch from 2.10 up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block_sparse.h"

namespace mlprune {
namespace {

using torch::stable::Tensor;
namespace boxed = torch::stable::detail;

struct InstructionSet {
  const char* name;
  int tile;
  void (*run)(const Product&, const Part&);
};

// Numbers are those of INSTRUCTION_SETS in operation.py.
const InstructionSet kInstructionSets[] = {
    {nullptr, 0, nullptr},
    {"avx2", avx2::kTile, &avx2::run},
    {"avx512", avx512::kTile, &avx512::run},
};

int best_instruction_set() {
  static const int best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? 2
               : 1;
  }();
  return best;
}

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

// No size is above this, so that products of two and of one with a few bytes are far from overflow.
constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();

// What is asked of a tensor here. At one token each question to torch is felt.
class Array {
 public:
  explicit Array(const Owned& tensor) : handle(tensor.get()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    bool is_empty = false;
    for (int64_t d = 0; d < dim; ++d) {
      is_empty |= sizes[d] == 0;
      STD_TORCH_CHECK(sizes[d] <= kMostSize, "expected sizes up to ", kMostSize, ", got ", sizes[d]);
    }
    STD_TORCH_CHECK(data || is_empty, "expected tensors with memory, got one whose storage was freed");
  }

  bool is_list(int64_t count, int32_t type) const {
    return dim == 1 && sizes[0] == count && dtype == type && (count < 2 || strides[0] == 1);
  }

  Tensor tensor() const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
    return Tensor(copy);
  }

  const AtenTensorHandle handle;
  int64_t dim;
  int64_t* sizes;
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

// Runs of grid rows with about equal numbers of blocks.
std::vector<int64_t> split_rows(const Product& p, int64_t grid_rows, int64_t parts) {
  std::vector<int64_t> bounds{0};
  for (int64_t part = 1; part < parts; ++part) {
    // A row without blocks costs something too: its outputs are written.
    const int64_t wanted = (p.crow[grid_rows] + grid_rows) * part / parts;
    int64_t row = bounds.back();
    while (row < grid_rows && p.crow[row] + row < wanted) ++row;
    bounds.push_back(row);
  }
  bounds.push_back(grid_rows);
  return bounds;
}

// The whole product, in parts for torch's threads.
void share_out(const Product& p, const InstructionSet& set) {
  const int64_t grid_rows = (p.rows + p.block_rows - 1) / p.block_rows;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (p.tokens + set.tile - 1) / set.tile;
  // Products of less work than this are done before a second thread has woken.
  constexpr double kSerial = 1 << 18;
  const double work = static_cast<double>(p.crow[grid_rows]) * p.block_rows * p.block_columns * p.tokens;
  if (threads == 1 || work < kSerial) {
    set.run(p, {0, tiles, tiles, 0, grid_rows});
  } else if (tiles >= threads) {
    // As many tiles for each thread; they are lower then, by less than half.
    const int64_t more = (tiles + threads - 1) / threads * threads;
    torch::stable::parallel_for(0, more, 1, [&](int64_t begin, int64_t end) {
      set.run(p, {begin, end, more, 0, grid_rows});
    });
  } else {
    const std::vector<int64_t> bounds = split_rows(p, grid_rows, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      set.run(p, {0, tiles, tiles, bounds[begin], bounds[end]});
    });
  }
}

// Memory for y, (..., outputs), and its handle. Much of it asks for huge pages: clearing fresh pages of 4 KiB one by
// one would take up to half of the time at low densities.
Owned make_output(const Array& x, Product& p) {
  constexpr int64_t kMost = 64;
  STD_TORCH_CHECK(x.dim <= kMost, "x: expected at most ", kMost, " dimensions, got ", x.dim);
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

// Few and in the cache: what native code reads and writes by is checked at every call.
void check_structure(const Product& p, int64_t blocks) {
  const int64_t grid_rows = (p.rows + p.block_rows - 1) / p.block_rows;
  const int64_t grid_columns = (p.columns + p.block_columns - 1) / p.block_columns;
  STD_TORCH_CHECK(p.crow[0] == 0 && p.crow[grid_rows] == blocks, "crow_indices: expected 0 to blocks");
  for (int64_t r = 0; r < grid_rows; ++r)
    STD_TORCH_CHECK(p.crow[r] <= p.crow[r + 1], "crow_indices: expected rows that do not end before they begin");
  // Without branches, so that the compiler takes several at once: the highest bit is set by a negative column, and by
  // one that is not above the one before.
  uint32_t bad = 0;
  bool is_within = true;
  for (int64_t r = 0; r < grid_rows; ++r) {
    const int64_t begin = p.crow[r], end = p.crow[r + 1];
    if (begin == end) continue;
    const auto* col = reinterpret_cast<const uint32_t*>(p.col);
    bad |= col[begin];
    for (int64_t b = begin + 1; b < end; ++b) bad |= col[b] | (col[b] - col[b - 1] - 1);
    is_within &= p.col[end - 1] < grid_columns;
  }
  STD_TORCH_CHECK(
      bad >> 31 == 0 && is_within, "col_indices: expected columns of the grid of x, increasing within each row");
  if (p.row_places)
    for (int64_t r = 0; r < p.rows; ++r)
      STD_TORCH_CHECK(
          p.row_places[r] >= (r ? p.row_places[r - 1] + 1 : 0) && p.row_places[r] < p.outputs,
          "row_indices: expected increasing places below scatter_size");
}

// y = act(x W^T + b); W is as wide as x. With `places`, (rows,), row r is written to place places[r] of `outputs`.
AtenTensorHandle multiply_arrays(
    const Array& x, const Array& values, const Array& crow, const Array& col, const Array& bias,
    const Array* places, int64_t outputs, int64_t activation, int64_t instruction_set) {
  const int best = best_instruction_set();
  STD_TORCH_CHECK(
      best > 0 && instruction_set >= 0 && instruction_set <= best,
      "instruction_set: expected a processor that has it; this one has number ", best, ", got ", instruction_set);
  STD_TORCH_CHECK(activation >= 0 && activation <= 3, "activation: expected 0 to 3, got ", activation);
  Product p{};
  p.bfloat16 = x.dtype == aoti_torch_dtype_bfloat16();
  STD_TORCH_CHECK(p.bfloat16 || x.dtype == aoti_torch_dtype_float32(), "x: expected float32 or bfloat16");
  STD_TORCH_CHECK(x.dim > 0, "x: expected (..., columns)");
  STD_TORCH_CHECK(values.dim == 3, "values: expected (blocks, block columns, block rows)");
  STD_TORCH_CHECK(values.dtype == x.dtype, "values: expected the dtype of x");
  STD_TORCH_CHECK(bias.dim == 1 && bias.dtype == x.dtype, "bias: expected (rows,) of the dtype of x");
  const int64_t blocks = values.sizes[0];
  p.tokens = 1;
  int64_t extent = 1;
  for (int64_t d = 0; d < x.dim - 1; ++d) {
    p.tokens *= x.sizes[d];
    extent *= std::max<int64_t>(x.sizes[d], 1);
    STD_TORCH_CHECK(extent <= kMostSize, "x: expected up to ", kMostSize, " tokens");
  }
  p.columns = x.sizes[x.dim - 1];
  p.column_stride = x.strides[x.dim - 1];
  p.block_rows = values.sizes[2];
  p.block_columns = values.sizes[1];
  p.rows = bias.sizes[0];
  STD_TORCH_CHECK(outputs >= 0 && outputs <= kMostSize, "scatter_size: expected 0 to ", kMostSize, ", got ", outputs);
  p.outputs = outputs;
  // 3: a gelu of the first half of the rows, which the second half gates.
  const bool gated = activation == 3;
  STD_TORCH_CHECK(!gated || p.rows % 2 == 0, "bias: expected two equal halves of rows, got ", p.rows, " rows");
  p.activation = gated ? Activation::gelu : static_cast<Activation>(activation);
  p.activated_rows = p.activation == Activation::none ? 0 : gated ? p.rows / 2 : p.rows;
  STD_TORCH_CHECK(p.block_rows > 0 && p.block_columns > 0, "values: expected blocks of some size");
  STD_TORCH_CHECK(
      crow.is_list((p.rows + p.block_rows - 1) / p.block_rows + 1, aoti_torch_dtype_int32()),
      "crow_indices: expected contiguous int32 (grid rows + 1,)");
  STD_TORCH_CHECK(
      col.is_list(blocks, aoti_torch_dtype_int32()), "col_indices: expected contiguous int32, one entry per block");
  STD_TORCH_CHECK(
      !places || places->is_list(p.rows, aoti_torch_dtype_int64()),
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
    if (p.rows > 0) share_out(p, kInstructionSets[instruction_set ? instruction_set : best]);
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
  const char* name = kInstructionSets[best_instruction_set()].name;
  return name ? name : "";
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
