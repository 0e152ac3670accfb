/* One element after the other: what is written (a block times a factor, a block clamped), maxima, and sums of odd powers.
 *
 * Plain loops, which compilers turn into vectors by themselves. float32, bf16 and fp16 are scaled in float32 and rounded to nearest
 * even, as torch does it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One function for each instruction set, chosen when the library is loaded. It needs gcc and a loader that knows ifuncs. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define ELEMENT static inline __attribute__((always_inline))

ELEMENT float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

ELEMENT uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

ELEMENT float read_f32(float x) { return x; }
ELEMENT float write_f32(float x) { return x; }
ELEMENT double read_f64(double x) { return x; }
ELEMENT double write_f64(double x) { return x; }

ELEMENT float read_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

ELEMENT uint16_t write_bf16(float x) {
  uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & INT32_MAX) > 0x7f800000 ? 0x7fc0 : rounded);
}

ELEMENT float read_f16(uint16_t x) { /* see from_half */
  uint32_t bits = (uint32_t)(x & 0x7fff) << 13, exponent = bits & 0x0f800000;
  uint32_t subnormal = exponent == 0 ? UINT32_MAX : 0, beyond = exponent == 0x0f800000 ? UINT32_MAX : 0;
  bits += (112u << 23) + (beyond & (112u << 23)) + (subnormal & (1u << 23));
  return float_of(bits_of(float_of(bits) - float_of(subnormal & (113u << 23))) | (uint32_t)(x & 0x8000) << 16);
}

ELEMENT uint16_t write_f16(float x) {
  uint32_t bits = bits_of(x), size = bits & INT32_MAX, sign = bits >> 16 & 0x8000;
  uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13; /* rounding may reach 0x7c00, inf */
  uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000; /* 0.5 makes the adder round at fp16's last place, 2^-24 */
  uint32_t out = size < 113u << 23 ? small : normal;
  out = size >= 143u << 23 ? 0x7c00 : out;
  out = size > 0x7f800000 ? 0x7e00 : out;
  return (uint16_t)(sign | out);
}

#define EDITS(DTYPE, T, WIDE)                                                          \
  CLONES static void scale_##DTYPE(char *x, int64_t n, double by) {                    \
    T *g = (T *)x;                                                                     \
    WIDE factor = (WIDE)by;                                                            \
    for (int64_t i = 0; i < n; i++) g[i] = write_##DTYPE(read_##DTYPE(g[i]) * factor); \
  }                                                                                    \
  CLONES static void clamp_##DTYPE(char *x, int64_t n, double value) {                 \
    T *g = (T *)x;                                                                     \
    WIDE limit = (WIDE)value;                                                          \
    for (int64_t i = 0; i < n; i++) {                                                  \
      WIDE wide = read_##DTYPE(g[i]);                                                  \
      wide = wide > limit ? limit : wide;                                              \
      wide = wide < -limit ? -limit : wide;                                            \
      g[i] = write_##DTYPE(wide);                                                      \
    }                                                                                  \
  }

/* max |x|: as integers, sizes keep their order, inf is above all numbers and NaN above inf. */
#define MAXIMUM(DTYPE, T, INT, MASK)                                    \
  CLONES static INT top_##DTYPE(const char *x, int64_t n) {             \
    const INT *bits = (const INT *)x;                                   \
    INT top = 0;                                                        \
    for (int64_t i = 0; i < n; i++) {                                   \
      INT size = (INT)(bits[i] & (MASK));                               \
      top = size > top ? size : top;                                    \
    }                                                                   \
    return top;                                                         \
  }                                                                     \
  static double sum_max_##DTYPE(const char *x, int64_t n, double p) {   \
    INT bits = top_##DTYPE(x, n);                                       \
    T top;                                                              \
    memcpy(&top, &bits, sizeof top);                                    \
    (void)p;                                                            \
    return read_##DTYPE(top);                                           \
  }

/* pow() takes nearly all the time: no clones. The limit of the plain sum is inf. 32 partial sums keep the rounding small. */
#define POWERS(DTYPE, T)                                                                \
  static double clamped_any_##DTYPE(const char *x, int64_t n, double p, double limit) { \
    const T *g = (const T *)x;                                                          \
    double sums[32] = {0}, sum = 0;                                                     \
    for (int64_t i = 0; i < n; i++) {                                                   \
      double size = fabs((double)read_##DTYPE(g[i]));                                   \
      sums[i % 32] += pow(size > limit ? limit : size, p);                              \
    }                                                                                   \
    for (int i = 0; i < 32; i++) sum += sums[i];                                        \
    return sum;                                                                         \
  }                                                                                     \
  static double sum_any_##DTYPE(const char *x, int64_t n, double p) { return clamped_any_##DTYPE(x, n, p, INFINITY); }

#define ELEMENTS(DTYPE, T, WIDE, INT, MASK) \
  EDITS(DTYPE, T, WIDE)                     \
  MAXIMUM(DTYPE, T, INT, MASK)              \
  POWERS(DTYPE, T)

ELEMENTS(f32, float, float, int32_t, INT32_MAX)
ELEMENTS(f64, double, double, int64_t, INT64_MAX)
ELEMENTS(bf16, uint16_t, float, int16_t, INT16_MAX)
ELEMENTS(f16, uint16_t, float, int16_t, INT16_MAX)
