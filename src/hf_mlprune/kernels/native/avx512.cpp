// For x86-64 with AVX-512 F, BW, DQ and VL. See avx2.cpp for what may stand here.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "block_sparse.h"

namespace mlprune::avx512 {
namespace {
constexpr int kLanes = 16;

inline float __attribute__((vector_size(64))) load_partial(const float* from, int, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}

inline float __attribute__((vector_size(64))) load_partial(const uint16_t* from, int, int count) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

#include "tile.inc"
}  // namespace

void run(const Product& p, const Part& part) { multiply(p, part); }
}  // namespace mlprune::avx512
