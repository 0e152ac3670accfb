/* What is read of one block: sums of powers, maxima, and the terms of the cosine between a gradient and its clamped self.
 *
 * Everything is added in float64, in an order fixed by the block alone. Squares of float32, bf16 and fp16 are exact. */
#ifndef DISTCLIP_SUMS_H
#define DISTCLIP_SUMS_H

#include <math.h>

#include "lanes.h"

INLINE d8 power_1(d8 x, double p) { (void)p; return absolute(x); }
INLINE d8 power_2(d8 x, double p) { (void)p; return x * x; }

/* p = 3 ... 8 */
INLINE d8 power_whole(d8 x, double p) {
  int order = (int)p;
  d8 once = absolute(x), twice = once * once, four = twice * twice, one = (d8){0} + 1.0;
  return (order & 8 ? four * four : one) * (order & 4 ? four : one) * ((order & 2 ? twice : one) * (order & 1 ? once : one));
}

INLINE d8 power_any(d8 x, double p) {
  double lanes[8];
  memcpy(lanes, &x, sizeof x);
  for (int lane = 0; lane < 8; lane++) lanes[lane] = pow(fabs(lanes[lane]), p);
  memcpy(&x, lanes, sizeof x);
  return x;
}

#define STEP 32 /* elements; a multiple of what `load` reads */

/* The last, partial step is read from a copy filled up with zeros, which add nothing to a sum. */
#define EACH_STEP(SIZE, BODY)                         \
  char rest[STEP * (SIZE)];                           \
  for (; n > 0; n -= STEP, x += STEP * (SIZE)) {      \
    if (n < STEP) {                                   \
      memset(rest, 0, sizeof rest);                   \
      x = memcpy(rest, x, (size_t)n * (SIZE));        \
    }                                                 \
    BODY                                              \
  }

#define SUM(CLONES, DTYPE, SIZE, KIND)                                                   \
  CLONES static double sum_##KIND##_##DTYPE(const char *x, int64_t n, double p) { \
    d8 sums[4] = {{0}}, g[4];                                                    \
    EACH_STEP(SIZE, {                                                            \
      load_##DTYPE(x, g);                                                        \
      load_##DTYPE(x + 16 * (SIZE), g + 2);                                      \
      for (int i = 0; i < 4; i++) sums[i] += power_##KIND(g[i], p);              \
    })                                                                           \
    return total(sums);                                                          \
  }

/* max |x|: as integers, sizes keep their order, inf is above all numbers and NaN above inf. */
#define MAXIMUM(DTYPE, BITS, INT, MASK)                                        \
  CLONES static INT top_##DTYPE(const char *x, int64_t n) {                    \
    const BITS *bits = (const BITS *)x;                                        \
    INT top = 0;                                                               \
    for (int64_t i = 0; i < n; i++) {                                          \
      INT size = (INT)(bits[i] & (MASK));                                      \
      top = size > top ? size : top;                                           \
    }                                                                          \
    return top;                                                                \
  }                                                                            \
  static double sum_max_##DTYPE(const char *x, int64_t n, double p) {          \
    (void)p;                                                                   \
    BITS first[16] = {(BITS)top_##DTYPE(x, n)};                                \
    d8 wide[2];                                                                \
    load_##DTYPE((const char *)first, wide);                                   \
    double top = 0;                                                            \
    for (int lane = 0; lane < 8; lane++) /* the others are 0 */                \
      for (int half = 0; half < 2; half++)                                     \
        if (wide[half][lane] != 0) top = wide[half][lane];                \
    return top;                                                                \
  }

/* The sum of |clamped x|^p, where it is not that of the squares. */
#define CLAMPED_SUM(CLONES, DTYPE, SIZE, KIND)                                                           \
  CLONES static double clamped_##KIND##_##DTYPE(const char *x, int64_t n, double p, double limit) { \
    d8 sums[4] = {{0}}, g[4];                                                                    \
    EACH_STEP(SIZE, {                                                                            \
      load_##DTYPE(x, g);                                                                        \
      load_##DTYPE(x + 16 * (SIZE), g + 2);                                                      \
      for (int i = 0; i < 4; i++) sums[i] += power_##KIND(clamped(g[i], beyond(g[i], limit), limit), p); \
    })                                                                                           \
    return total(sums);                                                                          \
  }

/* out: sum x², sum c², sum x·c, and the number of elements beyond the limit */
#define COSINE(DTYPE, SIZE)                                                                \
  CLONES static void cosine_##DTYPE(const char *x, int64_t n, double limit, double *out) { \
    d8 raw[2] = {{0}}, kept[2] = {{0}}, both[2] = {{0}}, g[2];                             \
    l8 number = {0};                                                                       \
    EACH_STEP(SIZE, {                                                                      \
      for (int half = 0; half < 2; half++) {                                               \
        load_##DTYPE(x + half * 16 * (SIZE), g);                                           \
        for (int i = 0; i < 2; i++) {                                                      \
          l8 over = beyond(g[i], limit);                                                   \
          d8 c = clamped(g[i], over, limit);                                               \
          raw[i] += g[i] * g[i];                                                           \
          kept[i] += c * c;                                                                \
          both[i] += g[i] * c;                                                             \
          number += over;                                                                  \
        }                                                                                  \
      }                                                                                    \
    })                                                                                     \
    d8 count = __builtin_convertvector(number, d8), none = {0};                            \
    out[0] = total((d8[]){raw[0], raw[1], none, none});                                    \
    out[1] = total((d8[]){kept[0], kept[1], none, none});                                  \
    out[2] = total((d8[]){both[0], both[1], none, none});                                  \
    out[3] = total((d8[]){count, none, none, none});                                       \
  }

#define READERS(DTYPE, SIZE)           \
  SUM(CLONES, DTYPE, SIZE, 1)                  \
  SUM(CLONES, DTYPE, SIZE, 2)                  \
  SUM(CLONES, DTYPE, SIZE, whole)              \
  SUM(, DTYPE, SIZE, any)                \
  CLAMPED_SUM(CLONES, DTYPE, SIZE, 1)          \
  CLAMPED_SUM(CLONES, DTYPE, SIZE, whole)      \
  CLAMPED_SUM(, DTYPE, SIZE, any)        \
  COSINE(DTYPE, SIZE)

READERS(f32, 4)
READERS(f64, 8)
READERS(bf16, 2)
READERS(f16, 2)
MAXIMUM(f32, uint32_t, int32_t, INT32_MAX)
MAXIMUM(f64, uint64_t, int64_t, INT64_MAX)
MAXIMUM(bf16, uint16_t, int16_t, INT16_MAX)
MAXIMUM(f16, uint16_t, int16_t, INT16_MAX)

#endif
