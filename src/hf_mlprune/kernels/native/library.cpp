// The operation `hf_mlprune::block_sparse_linear`, on torch's stable ABI: one shared object for every
// torch from 2.10 up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "block_sparse.h"

namespace mlprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

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

// Offsets of the tokens of x, (..., columns), whose leading dimensions have any strides.
std::vector<int64_t> token_offsets(Sizes sizes, Sizes strides, int64_t tokens) {
  std::vector<int64_t> offsets(tokens, 0);
  int64_t inner = 1;
  for (size_t d = sizes.size() - 1; d-- > 0;) {
    for (int64_t t = 0; t < tokens; ++t) offsets[t] += t / inner % sizes[d] * strides[d];
    inner *= sizes[d];
  }
  return offsets;
}

// Whether all leading dimensions can be walked by one stride.
bool has_one_stride(Sizes sizes, Sizes strides) {
  for (size_t d = sizes.size() - 1; d-- > 1;)
    if (sizes[d - 1] != 1 && strides[d - 1] != strides[d] * sizes[d]) return false;
  return true;
}

// Runs of strips with about equal numbers of blocks.
std::vector<int64_t> split_strips(const Product& p, int64_t strips, int64_t parts) {
  const int64_t each = strips_per_grid_row(p), blocks = p.crow[strips / each];
  std::vector<int64_t> bounds{0};
  for (int64_t part = 1; part < parts; ++part) {
    // A strip without blocks costs something too: its outputs are written.
    const int64_t wanted = (blocks + strips / each) * part / parts;
    int64_t row = bounds.back() / each;
    while (row < strips / each && p.crow[row] + row < wanted) ++row;
    bounds.push_back(row * each);
  }
  bounds.push_back(strips);
  return bounds;
}

void run(const InstructionSet& set, const Product& p) {
  const int64_t grid_rows = (p.rows + p.block_rows - 1) / p.block_rows;
  const int64_t strips = grid_rows * strips_per_grid_row(p);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles = (p.tokens + set.tile - 1) / set.tile;
  // Products of less work than this are done before a second thread has woken.
  constexpr double kSerial = 1 << 18;
  const double work = static_cast<double>(p.crow[grid_rows]) * p.block_rows * p.block_columns * p.tokens;
  if (threads == 1 || work < kSerial) {
    set.run(p, {0, tiles, tiles, 0, strips});
  } else if (tiles >= threads) {
    const int64_t even = (tiles + threads - 1) / threads * threads;
    torch::stable::parallel_for(0, even, 1, [&](int64_t begin, int64_t end) {
      set.run(p, {begin, end, even, 0, strips});
    });
  } else {
    const std::vector<int64_t> bounds = split_strips(p, strips, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      set.run(p, {0, tiles, tiles, bounds[begin], bounds[end]});
    });
  }
}

// An output. Large ones ask for huge pages: clearing fresh pages of 4 KiB one by one would take up to half of
// the time at low densities.
Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * shape[d];
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor y(handle);
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(y.data_ptr());
  const uintptr_t end = begin + y.numel() * (type == ScalarType::Float ? 4 : 2);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  // Advice only: where it is refused, nothing is lost.
  if (end >= first + kHuge)
    madvise(reinterpret_cast<void*>(first), (end - first) / kHuge * kHuge, MADV_HUGEPAGE);
  return y;
}

Tensor block_sparse_linear(
    const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row_indices, int64_t columns,
    int64_t outputs, int64_t activation, int64_t instruction_set) {
  const int best = best_instruction_set();
  STD_TORCH_CHECK(
      best > 0 && instruction_set >= 0 && instruction_set <= best,
      "instruction_set: expected a processor that has it; this one has number ", best, ", got ", instruction_set);
  const InstructionSet& set = kInstructionSets[instruction_set ? instruction_set : best];
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: expected 0, 1 or 2, got ", activation);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "x: expected float32 or bfloat16");
  const Sizes sizes = x.sizes(), strides = x.strides(), blocks = values.sizes();
  const size_t leading = sizes.size() - 1;
  STD_TORCH_CHECK(!sizes.empty() && sizes[leading] == columns, "x: expected (..., ", columns, ")");
  STD_TORCH_CHECK(blocks.size() == 3, "values: expected (blocks, block rows, block columns)");
  STD_TORCH_CHECK(values.scalar_type() == type, "values: expected the dtype of x");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == type, "bias: expected the dtype of x");
  const int64_t rows = row_indices ? row_indices->numel() : outputs;
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == rows), "bias: expected one entry per row");

  Product p{};
  p.half = type == ScalarType::BFloat16;
  p.columns = columns;
  p.column_stride = strides[leading];
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[leading] = outputs;
  p.tokens = std::accumulate(sizes.begin(), sizes.begin() + leading, int64_t{1}, std::multiplies<>());
  p.block_rows = blocks[1];
  p.block_columns = blocks[2];
  p.rows = rows;
  p.outputs = outputs;
  p.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK(p.block_rows > 0 && p.block_columns > 0 && rows >= 0, "values: expected blocks of some size");
  const int64_t grid_rows = (rows + p.block_rows - 1) / p.block_rows;
  STD_TORCH_CHECK(
      crow_indices.scalar_type() == ScalarType::Int && crow_indices.dim() == 1 &&
          crow_indices.size(0) == grid_rows + 1 && crow_indices.is_contiguous(),
      "crow_indices: expected int32 (grid rows + 1,)");
  STD_TORCH_CHECK(
      col_indices.scalar_type() == ScalarType::Int && col_indices.dim() == 1 &&
          col_indices.size(0) == blocks[0] && col_indices.is_contiguous(),
      "col_indices: expected int32, one entry per block");
  STD_TORCH_CHECK(
      !row_indices || (row_indices->scalar_type() == ScalarType::Long && row_indices->dim() == 1 &&
                       row_indices->is_contiguous()),
      "row_indices: expected int64, one place per row");
  p.crow = static_cast<const int32_t*>(crow_indices.data_ptr());
  p.col = static_cast<const int32_t*>(col_indices.data_ptr());
  // Few and in the cache: what native code reads and writes by is checked at every call.
  STD_TORCH_CHECK(p.crow[0] == 0 && p.crow[grid_rows] == blocks[0], "crow_indices: expected 0 to blocks");
  for (int64_t r = 0; r < grid_rows; ++r)
    STD_TORCH_CHECK(p.crow[r] <= p.crow[r + 1], "crow_indices: expected increasing values");
  const int64_t grid_columns = (p.columns + p.block_columns - 1) / p.block_columns;
  // Without branches, so that the compiler can take several at once; a negative one becomes enormous.
  bool outside = false;
  for (int64_t b = 0; b < blocks[0]; ++b)
    outside |= static_cast<uint32_t>(p.col[b]) >= static_cast<uint64_t>(grid_columns);
  STD_TORCH_CHECK(!outside, "col_indices: expected columns of the grid of x");
  if (row_indices) {
    p.row_places = static_cast<const int64_t*>(row_indices->data_ptr());
    for (int64_t r = 0; r < rows; ++r)
      STD_TORCH_CHECK(p.row_places[r] >= 0 && p.row_places[r] < outputs, "row_indices: expected outputs");
  }

  const Tensor y = empty(shape, type);
  p.y = y.data_ptr();
  if (p.tokens == 0 || outputs == 0) return y;
  if (row_indices) std::memset(p.y, 0, p.tokens * outputs * (p.half ? 2 : 4));
  if (rows == 0) return y;
  std::vector<int64_t> offsets;
  if (has_one_stride(sizes, strides)) {
    p.row_stride = leading ? strides[leading - 1] : 0;
  } else {
    offsets = token_offsets(sizes, strides, p.tokens);
    p.row_offsets = offsets.data();
  }
  const Sizes steps = values.strides();
  const bool is_packed =
      steps[0] == p.block_rows * p.block_columns && steps[1] == 1 && steps[2] == p.block_rows;
  const Tensor packed = is_packed ? values : torch::stable::contiguous(torch::stable::transpose(values, 1, 2));
  const std::optional<Tensor> whole_bias = bias && bias->stride(0) != 1 ? torch::stable::contiguous(*bias) : bias;
  p.x = x.data_ptr();
  p.values = packed.data_ptr();
  p.bias = bias ? whole_bias->data_ptr() : nullptr;
  run(set, p);
  return y;
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
      "block_sparse_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
      "Tensor? row_indices, int columns, int outputs, int activation=0, int instruction_set=0) -> Tensor");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hf_mlprune, CPU, library) {
  library.impl("block_sparse_linear", TORCH_BOX(&mlprune::block_sparse_linear));
}

STABLE_TORCH_LIBRARY_IMPL(hf_mlprune, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&mlprune::instruction_set));
}
