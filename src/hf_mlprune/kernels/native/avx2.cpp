// For x86-64 with AVX2 and FMA. Nothing of the standard library may be instantiated here but inline:
// the linker could keep this file's copy of a function, which other processors cannot run.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "block_sparse.h"

namespace mlprune::avx2 {
namespace {
constexpr int kLanes = 8;

inline float __attribute__((vector_size(32))) load_partial(const float* from, int skip, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(from + skip, _mm256_cmpgt_epi32(_mm256_set1_epi32(count - skip), lane));
}

inline float __attribute__((vector_size(32))) load_partial(const uint16_t* from, int skip, int count) {
  alignas(32) uint32_t words[8] = {};
  for (int i = 0; i < 8 && skip + i < count; ++i) words[i] = static_cast<uint32_t>(from[skip + i]) << 16;
  return _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(words)));
}

#include "tile.inc"
}  // namespace

void run(const Product& p, const Part& part) { multiply(p, part); }
}  // namespace mlprune::avx2
