/* Vectors for any machine: two or more of its registers each, by the compiler's own lowering. */
#include <string.h>

#define SET(NAME) NAME##_plain
#define ATTRIBUTE
#define WIDTH 4
#include "lanes.h"

INLINE doubles widened_plain(floats x) { return __builtin_convertvector(x, doubles); }

/* fp16 bits in the low half of each word, to float32, exactly: exponents are moved by integers, and a subnormal, made normal
 * by one more step of the exponent, loses the 2^-14 that this added. Masks come from the sign of a difference: gcc 12 breaks
 * down on some vector comparisons. */
INLINE floats from_half(words half) {
  words bits = (half & 0x7fff) << 13;
  numbers exponent = (numbers)(bits & 0x0f800000);
  words subnormal = (words)((exponent - 1) >> 31);
  words beyond = (words)((0x0f7fffff - exponent) >> 31);
  bits += (112u << 23) + (beyond & (112u << 23)) + (subnormal & (1u << 23));
  floats size = (floats)bits - (floats)(subnormal & (113u << 23));
  return (floats)((words)size | (half & 0x8000) << 16);
}

INLINE void load_f16_plain(const char *x, doubles *out) {
  words pairs = *(const words_stored *)x;
  out[0] = widened_plain(from_half(pairs & 0xffff));
  out[1] = widened_plain(from_half(pairs >> 16));
}

/* -1 in the lanes where |x| > limit >= 0, else 0 (also for NaN). Sizes are ordered as their bits are. */
INLINE longs over_plain(doubles x, double limit) {
  int64_t bound;
  memcpy(&bound, &limit, sizeof bound);
  longs size = (longs)absolute_plain(x), infinite = (longs){0} + 0x7ff0000000000000;
  return -(longs)(((unsigned_longs)(bound - size) & ~(unsigned_longs)(infinite - size)) >> 63);
}

INLINE doubles clamped_plain(doubles x, double limit) {
  longs mask = over_plain(x, limit), bound = (longs)((doubles){0} + limit), sign = (longs)x & INT64_MIN;
  return (doubles)((bound & mask) | ((longs)absolute_plain(x) & ~mask) | sign);
}

INLINE int64_t beyond_plain(doubles x, double limit) {
  longs over = over_plain(x, limit);
  return -(over[0] + over[1] + over[2] + over[3]);
}

#include "sums.h"
#include "unset.h"
