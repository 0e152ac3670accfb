/* Sixteen gradient elements of any dtype to sixteen doubles, by GNU vectors (gcc and clang lower them to what the machine has).
 *
 * The lanes are explicit because a compiler may not reorder a floating-point sum by itself, and the fast-math flags that let it
 * also let it assume that no NaN exists. */
#ifndef DISTCLIP_LANES_H
#define DISTCLIP_LANES_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* One function per instruction set, chosen when the library is loaded. It needs gcc and a loader that knows ifuncs. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

typedef double d8 __attribute__((vector_size(64)));
typedef int64_t l8 __attribute__((vector_size(64)));
typedef uint64_t v8 __attribute__((vector_size(64)));
typedef float f8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
/* As they lie in memory: aligned to one element only. */
typedef double d8_stored __attribute__((vector_size(64), aligned(8), may_alias));
typedef float f8_stored __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u8_stored __attribute__((vector_size(32), aligned(2), may_alias));

/* Each reads 16 elements. The order of the lanes does not matter to a sum, so the halves of a word need no shuffle. */
INLINE void load_f64(const char *x, d8 *out) {
  out[0] = *(const d8_stored *)x;
  out[1] = *(const d8_stored *)(x + 64);
}

INLINE void load_f32(const char *x, d8 *out) {
  out[0] = __builtin_convertvector((f8)(*(const f8_stored *)x), d8);
  out[1] = __builtin_convertvector((f8)(*(const f8_stored *)(x + 32)), d8);
}

INLINE void load_bf16(const char *x, d8 *out) {
  u8 words = *(const u8_stored *)x;
  out[0] = __builtin_convertvector((f8)(words << 16), d8);
  out[1] = __builtin_convertvector((f8)(words & 0xffff0000u), d8);
}

/* fp16 bits in the low half of each word, to float32, exactly: exponents are moved by integers, and a subnormal, made normal
 * by one more step of the exponent, loses the 2^-14 that this added. Masks come from the sign of a difference: gcc 12 breaks
 * down on vector comparisons in functions with clones. */
INLINE f8 from_half(u8 half) {
  u8 bits = (half & 0x7fff) << 13;
  i8 exponent = (i8)(bits & 0x0f800000);
  u8 subnormal = (u8)((exponent - 1) >> 31);
  u8 beyond = (u8)((0x0f7fffff - exponent) >> 31);
  bits += (112u << 23) + (beyond & (112u << 23)) + (subnormal & (1u << 23));
  f8 size = (f8)bits - (f8)(subnormal & (113u << 23));
  return (f8)((u8)size | (half & 0x8000) << 16);
}

INLINE void load_f16(const char *x, d8 *out) {
  u8 words = *(const u8_stored *)x;
  out[0] = __builtin_convertvector(from_half(words & 0xffff), d8);
  out[1] = __builtin_convertvector(from_half(words >> 16), d8);
}

INLINE d8 absolute(d8 x) { return (d8)((l8)x & INT64_MAX); }

/* 1 in the lanes where |x| > limit >= 0, else 0 (also for NaN). Sizes are ordered as their bits are. */
INLINE l8 beyond(d8 x, double limit) {
  int64_t bound;
  memcpy(&bound, &limit, sizeof bound);
  l8 size = (l8)absolute(x), infinite = (l8){0} + 0x7ff0000000000000;
  return (l8)((v8)(bound - size) >> 63) & ~(l8)((v8)(infinite - size) >> 63);
}

/* x clamped to [-limit, limit]; `over` is beyond(x, limit). NaN stays NaN. */
INLINE d8 clamped(d8 x, l8 over, double limit) {
  d8 bound = (d8){0} + limit;
  l8 mask = -over, sign = (l8)x & INT64_MIN;
  return (d8)(((l8)bound & mask) | ((l8)absolute(x) & ~mask) | sign);
}

INLINE double total(const d8 *lanes) {
  d8 sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

#endif
