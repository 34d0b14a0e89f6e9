// What every library of these products needs besides the products themselves: the choice of instructions, the checks
// of what a caller hands over, and the shares of threads. Errors are std::runtime_error, in words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "block_sparse.h"

namespace mlprune {

struct InstructionSet {
  const char* name;
  int tile;
  void (*run)(const Product&, const Part&);
};

// Numbers are those of INSTRUCTION_SETS in operation.py.
inline const InstructionSet kInstructionSets[] = {
    {"", 0, nullptr},
    {"avx2", avx2::kTile, &avx2::run},
    {"avx512", avx512::kTile, &avx512::run},
};

inline int best_instruction_set() {
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

template <class Word>
inline std::string text(const Word& word) {
  if constexpr (std::is_integral_v<Word>) return std::to_string(word);
  else return word;
}

// No stream: those of old C++ libraries lack what a new compiler calls.
template <class... Words>
inline void check(bool is_right, const Words&... words) {
  if (is_right) [[likely]]
    return;
  throw std::runtime_error((std::string() + ... + text(words)));
}

// The one asked for; 0 is the best of this processor.
inline const InstructionSet& find_instruction_set(int64_t number) {
  const int best = best_instruction_set();
  check(
      best > 0 && number >= 0 && number <= best,
      "instruction_set: expected a processor that has it; this one has number ", best, ", got ", number);
  return kInstructionSets[number ? number : best];
}

// No size is above this, so that products of two and of one with a few bytes are far from overflow.
constexpr int64_t kMostSize = std::numeric_limits<int32_t>::max();

struct Shape {
  int64_t dim;
  const int64_t* sizes;

  bool has_zero() const { return std::find(sizes, sizes + dim, 0) != sizes + dim; }

  bool is_list(int64_t count) const { return dim == 1 && sizes[0] == count; }

  void check_sizes() const {
    for (int64_t d = 0; d < dim; ++d)
      check(sizes[d] <= kMostSize, "expected sizes up to ", kMostSize, ", got ", sizes[d]);
  }
};

// The sizes of a product, and which of its rows have an activation. W is as wide as x and as tall as the bias.
inline void set_sizes(
    Product& p, const Shape& x, const Shape& values, const Shape& bias, int64_t outputs, int64_t activation) {
  check(activation >= 0 && activation <= 3, "activation: expected 0 to 3, got ", activation);
  check(x.dim > 0, "x: expected (..., columns)");
  check(values.dim == 3, "values: expected (blocks, block columns, block rows)");
  check(bias.dim == 1, "bias: expected (rows,)");
  p.tokens = 1;
  int64_t extent = 1;
  for (int64_t d = 0; d < x.dim - 1; ++d) {
    p.tokens *= x.sizes[d];
    extent *= std::max<int64_t>(x.sizes[d], 1);
    check(extent <= kMostSize, "x: expected up to ", kMostSize, " tokens");
  }
  p.columns = x.sizes[x.dim - 1];
  p.block_rows = values.sizes[2];
  p.block_columns = values.sizes[1];
  p.rows = bias.sizes[0];
  check(outputs >= 0 && outputs <= kMostSize, "scatter_size: expected 0 to ", kMostSize, ", got ", outputs);
  p.outputs = outputs;
  // 3: a gelu of the first half of the rows, which the second half gates.
  const bool gated = activation == 3;
  check(!gated || p.rows % 2 == 0, "bias: expected two equal halves of rows, got ", p.rows, " rows");
  p.activation = gated ? Activation::gelu : static_cast<Activation>(activation);
  p.activated_rows = p.activation == Activation::none ? 0 : gated ? p.rows / 2 : p.rows;
  check(p.block_rows > 0 && p.block_columns > 0, "values: expected blocks of some size");
}

inline int64_t count_grid_rows(const Product& p) { return (p.rows + p.block_rows - 1) / p.block_rows; }

// Few and in the cache: what native code reads and writes by is checked at every call.
inline void check_structure(const Product& p, int64_t blocks) {
  const int64_t grid_rows = count_grid_rows(p);
  const int64_t grid_columns = (p.columns + p.block_columns - 1) / p.block_columns;
  check(p.crow[0] == 0 && p.crow[grid_rows] == blocks, "crow_indices: expected 0 to blocks");
  for (int64_t r = 0; r < grid_rows; ++r)
    check(p.crow[r] <= p.crow[r + 1], "crow_indices: expected rows that do not end before they begin");
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
  check(bad >> 31 == 0 && is_within, "col_indices: expected columns of the grid of x, increasing within each row");
  if (p.row_places)
    for (int64_t r = 0; r < p.rows; ++r)
      check(
          p.row_places[r] >= (r ? p.row_places[r - 1] + 1 : 0) && p.row_places[r] < p.outputs,
          "row_indices: expected increasing places below scatter_size");
}

// Runs of grid rows with about equal numbers of blocks.
inline std::vector<int64_t> split_rows(const Product& p, int64_t grid_rows, int64_t parts) {
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

// Products of less work than this are done before a second thread has woken.
inline bool is_worth_threads(const Product& p) {
  constexpr double kSerial = 1 << 18;
  return static_cast<double>(p.crow[count_grid_rows(p)]) * p.block_rows * p.block_columns * p.tokens >= kSerial;
}

// The whole product, in parts for threads. `parallel_for(count, body)` calls body(begin, end) for runs of 0 to count.
template <class ParallelFor>
void share_out(const Product& p, const InstructionSet& set, int64_t threads, const ParallelFor& parallel_for) {
  const int64_t grid_rows = count_grid_rows(p);
  const int64_t tiles = (p.tokens + set.tile - 1) / set.tile;
  if (threads == 1 || !is_worth_threads(p)) {
    set.run(p, {0, tiles, tiles, 0, grid_rows});
  } else if (tiles >= threads) {
    // As many tiles for each thread; they are lower then, by less than half.
    const int64_t more = (tiles + threads - 1) / threads * threads;
    parallel_for(more, [&](int64_t begin, int64_t end) { set.run(p, {begin, end, more, 0, grid_rows}); });
  } else {
    const std::vector<int64_t> bounds = split_rows(p, grid_rows, threads);
    parallel_for(threads, [&](int64_t begin, int64_t end) {
      set.run(p, {0, tiles, tiles, bounds[begin], bounds[end]});
    });
  }
}

}  // namespace mlprune
