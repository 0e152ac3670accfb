/* Vectors of AVX-512F: as avx2.h, twice as wide. */
#define SET(NAME) NAME##_avx512
#define ATTRIBUTE __attribute__((target("avx512f,avx2,f16c")))
#define WIDTH 8
#include "lanes.h"

INLINE doubles widened_avx512(floats x) { return (doubles)_mm512_cvtps_pd((__m256)x); }

INLINE void load_f16_avx512(const char *x, doubles *out) {
  out[0] = widened_avx512((floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)));
  out[1] = widened_avx512((floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + 16))));
}

INLINE doubles clamped_avx512(doubles x, double limit) {
  __m512d bound = _mm512_set1_pd(limit);
  return (doubles)_mm512_max_pd(-bound, _mm512_min_pd(bound, (__m512d)x));
}

INLINE int64_t beyond_avx512(doubles x, double limit) {
  return __builtin_popcount(_mm512_cmp_pd_mask((__m512d)absolute_avx512(x), _mm512_set1_pd(limit), _CMP_GT_OQ));
}

#include "sums.h"
#include "unset.h"
