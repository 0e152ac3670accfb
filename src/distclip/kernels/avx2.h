/* Vectors of AVX2, with the conversions of F16C. gcc's own conversions go through memory. */
#define SET(NAME) NAME##_avx2
#define ATTRIBUTE __attribute__((target("avx2,f16c")))
#define WIDTH 4
#include "lanes.h"

INLINE doubles widened_avx2(floats x) { return (doubles)_mm256_cvtps_pd((__m128)x); }

INLINE void load_f16_avx2(const char *x, doubles *out) {
  out[0] = widened_avx2((floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)x)));
  out[1] = widened_avx2((floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(x + 8))));
}

/* min and max answer their second argument where one is NaN */
INLINE doubles clamped_avx2(doubles x, double limit) {
  __m256d bound = _mm256_set1_pd(limit);
  return (doubles)_mm256_max_pd(-bound, _mm256_min_pd(bound, (__m256d)x));
}

INLINE int64_t beyond_avx2(doubles x, double limit) {
  return __builtin_popcount((unsigned)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)absolute_avx2(x), _mm256_set1_pd(limit), _CMP_GT_OQ)));
}

#include "sums.h"
#include "unset.h"
