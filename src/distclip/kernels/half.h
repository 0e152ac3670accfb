/* fp16 written by the conversions of F16C: eight times as fast as by integers, and the same bits. */
#define EDIT(NAME, WHAT)                                                                                     \
  __attribute__((target("avx2,f16c"))) static void NAME(char *x, int64_t n, double value) {                  \
    __m256 by = _mm256_set1_ps((float)value);                                                                \
    for (; n > 0; n -= 8, x += 16) {                                                                         \
      char rest[16] = {0};                                                                                   \
      char *at = n < 8 ? memcpy(rest, x, (size_t)n * 2) : x;                                                 \
      __m256 g = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));                                      \
      _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph(WHAT, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); \
      if (n < 8) memcpy(x, rest, (size_t)n * 2);                                                             \
    }                                                                                                        \
  }

EDIT(scale_f16c, _mm256_mul_ps(g, by))
EDIT(clamp_f16c, _mm256_max_ps(-by, _mm256_min_ps(by, g)))
