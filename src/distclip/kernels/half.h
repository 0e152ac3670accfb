/* 16-bit numbers scaled and clamped by vectors; the same bits as by the plain loops of edits.h.
 *
 * fp16 by the conversions of F16C: eight times as fast as by integers. */
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

/* bf16 as pairs in words: one of a pair is its high half, the other is shifted there and back. Rounded to nearest even; NaN is 0x7fc0. */
__attribute__((target("avx2"))) static inline __m256i rounded_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
}

#define EDIT_BF16(NAME, WHAT)                                                                                           \
  __attribute__((target("avx2"))) static void NAME(char *x, int64_t n, double value) {                                 \
    __m256 by = _mm256_set1_ps((float)value);                                                                          \
    __m256i high = _mm256_set1_epi32((int)0xffff0000u);                                                                 \
    for (; n > 0; n -= 16, x += 32) {                                                                                   \
      char rest[32] = {0};                                                                                              \
      char *at = n < 16 ? memcpy(rest, x, (size_t)n * 2) : x;                                                           \
      __m256i pairs = _mm256_loadu_si256((const __m256i *)at);                                                          \
      __m256 g = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));                                                     \
      __m256i low = _mm256_srli_epi32(rounded_bf16(WHAT), 16);                                                          \
      g = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));                                                           \
      _mm256_storeu_si256((__m256i *)at, _mm256_or_si256(low, _mm256_and_si256(rounded_bf16(WHAT), high)));             \
      if (n < 16) memcpy(x, rest, (size_t)n * 2);                                                                       \
    }                                                                                                                   \
  }

EDIT_BF16(scale_bf16_avx2, _mm256_mul_ps(g, by))
EDIT_BF16(clamp_bf16_avx2, _mm256_max_ps(-by, _mm256_min_ps(by, g)))
