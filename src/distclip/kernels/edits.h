/* What is written: a block times a factor, and a block clamped. Plain loops, which compilers turn into vectors by themselves.
 *
 * float32, bf16 and fp16 are computed in float32 and rounded to nearest even, as torch does it. */
#ifndef DISTCLIP_EDITS_H
#define DISTCLIP_EDITS_H

#include "lanes.h"

INLINE float float_of(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t bits_of(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

INLINE float read_f32(float x) { return x; }
INLINE float write_f32(float x) { return x; }
INLINE double read_f64(double x) { return x; }
INLINE double write_f64(double x) { return x; }

INLINE float read_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }
INLINE uint16_t write_bf16(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & INT32_MAX) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float read_f16(uint16_t x) { /* see from_half */
  uint32_t bits = (uint32_t)(x & 0x7fff) << 13, exponent = bits & 0x0f800000;
  uint32_t subnormal = exponent == 0 ? UINT32_MAX : 0, beyond = exponent == 0x0f800000 ? UINT32_MAX : 0;
  bits += (112u << 23) + (beyond & (112u << 23)) + (subnormal & (1u << 23));
  return float_of(bits_of(float_of(bits) - float_of(subnormal & (113u << 23))) | (uint32_t)(x & 0x8000) << 16);
}

INLINE uint16_t write_f16(float x) {
  uint32_t bits = bits_of(x), size = bits & INT32_MAX, sign = bits >> 16 & 0x8000;
  uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13; /* rounding may reach 0x7c00, inf */
  uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000; /* 0.5 makes the adder round at fp16's last place, 2^-24 */
  uint32_t out = size < 113u << 23 ? small : normal;
  out = size >= 143u << 23 ? 0x7c00 : out;
  out = size > 0x7f800000 ? 0x7e00 : out;
  return (uint16_t)(sign | out);
}

#define WRITERS(DTYPE, T, WIDE)                                                        \
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

WRITERS(f32, float, float)
WRITERS(f64, double, double)
WRITERS(bf16, uint16_t, float)
WRITERS(f16, uint16_t, float)

#endif
