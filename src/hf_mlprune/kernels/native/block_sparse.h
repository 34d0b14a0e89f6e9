// y = x W^T + b for a W of which only some blocks are stored.
#pragma once

#include <cstdint>

namespace mlprune {

enum class Activation { none, gelu, relu };

// Outputs are computed in strips of this many rows of W.
constexpr int kStrip = 16;
// Columns of x are laid out in chunks of this many; narrow ones for blocks of one column, whose neighbours in a cache
// line may not be wanted.
constexpr int kWide = 16, kNarrow = 4;

// One product. Pointers are to float, or to bfloat16 where it is set.
struct Product {
  bool bfloat16;
  const void* x;               // (tokens, columns), see row_offset and column_stride
  const int64_t* row_offsets;  // (tokens,) offsets of rows in elements; null: row_stride * token
  int64_t row_stride;
  int64_t column_stride;
  int64_t tokens;
  int64_t columns;
  const void* values;      // (blocks, block columns, block rows): each block is transposed
  const int32_t* crow;     // (grid rows + 1,)
  const int32_t* col;      // (blocks,)
  int64_t block_rows;
  int64_t block_columns;
  int64_t rows;
  const void* bias;           // (rows,)
  const int64_t* row_places;  // (rows,) places of rows in the output, or null
  int64_t outputs;            // features of y; more than `rows` where rows have places
  void* y;                    // (tokens, outputs), contiguous
  Activation activation;
  int64_t activated_rows;  // leading rows that have it
};

// Part of a product: tokens in tiles, and rows of the grid.
struct Part {
  int64_t tile_begin, tile_end, tiles;
  int64_t row_begin, row_end;
};

// First token of a tile; tiles differ by one token at most.
inline int64_t tile_start(int64_t tokens, int64_t tiles, int64_t tile) {
  const int64_t each = tokens / tiles, more = tokens % tiles;
  return tile * each + (tile < more ? tile : more);
}

namespace avx2 {
constexpr int kTile = 6;  // most tokens of a tile
void run(const Product&, const Part&);
}  // namespace avx2

namespace avx512 {
constexpr int kTile = 24;
void run(const Product&, const Part&);
}  // namespace avx512

}  // namespace mlprune
