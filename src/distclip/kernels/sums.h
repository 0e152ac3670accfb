/* What is read of one block: sums of powers, and the terms of the cosine between a gradient and its clamped self.
 *
 * Everything is added in float64, in an order fixed by the block and the instruction set. Squares of float32, bf16 and fp16 are
 * exact. Included once for each instruction set, after its `widened`, `load_f16`, `clamped` (NaN stays NaN) and `beyond`
 * (how many lanes have |x| > limit). */

INLINE doubles SET(power_1)(doubles x, double p) {
  (void)p;
  return SET(absolute)(x);
}

INLINE doubles SET(power_2)(doubles x, double p) {
  (void)p;
  return x * x;
}

/* p = 3 ... 8 */
INLINE doubles SET(power_whole)(doubles x, double p) {
  int order = (int)p;
  doubles once = SET(absolute)(x), twice = once * once, four = twice * twice, one = (doubles){0} + 1.0;
  return (order & 8 ? four * four : one) * (order & 4 ? four : one) * ((order & 2 ? twice : one) * (order & 1 ? once : one));
}

INLINE double SET(total)(const doubles *sums, int count) {
  doubles lanes = sums[0];
  double sum = 0;
  for (int i = 1; i < count; i++) lanes += sums[i];
  for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
  return sum;
}

#ifndef EACH_PAIR
#define STEP (8 * WIDTH) /* elements: 8 vectors of doubles, enough to hide the adder's latency */

/* What is left after the last whole pair of vectors is read from a copy filled up with zeros, which add nothing to a sum. Not inline:
 * gcc, who knows how short the copy is, would make it by string instructions, which take longer to start than it takes. */
__attribute__((noinline)) static const char *filled_up(char *rest, size_t size, const char *x, int64_t bytes) {
  memset(rest, 0, size);
  return memcpy(rest, x, (size_t)bytes);
}

/* BODY reads the pair of vectors at `at`, the `i`th and next of a step. The end of a tensor is no step but pairs: copying a whole
 * step would cost a tensor of 100 elements as much as its sum. Unrolled, so that sums[i] stays in a register. */
#define EACH_PAIR(SIZE, BODY)                                                     \
  char rest[2 * WIDTH * (SIZE)];                                                  \
  for (; n >= STEP; n -= STEP, x += STEP * (SIZE))                                \
    for (int i = 0; i < 8; i += 2) {                                              \
      const char *at = x + i * WIDTH * (SIZE);                                    \
      BODY                                                                        \
    }                                                                             \
  _Pragma("GCC unroll 4") for (int i = 0; i < 8; i += 2) {                        \
    if (n <= 0) break;                                                            \
    const char *at = n < 2 * WIDTH ? filled_up(rest, sizeof rest, x, n * (SIZE)) : x; \
    BODY                                                                          \
    n -= 2 * WIDTH;                                                               \
    x += 2 * WIDTH * (SIZE);                                                      \
  }

#define SUM(DTYPE, SIZE, KIND)                                                            \
  ATTRIBUTE static double SET(sum_##KIND##_##DTYPE)(const char *x, int64_t n, double p) { \
    doubles zero = {0}, sums[8] = {zero, zero, zero, zero, zero, zero, zero, zero}, g[2]; \
    EACH_PAIR(SIZE, {                                                                     \
      SET(load_##DTYPE)(at, g);                                                           \
      sums[i] += SET(power_##KIND)(g[0], p);                                              \
      sums[i + 1] += SET(power_##KIND)(g[1], p);                                          \
    })                                                                                    \
    return SET(total)(sums, 8);                                                           \
  }

/* out: sum x², sum c², sum x·c, sum |x|, sum |c|, and the number of elements beyond the limit */
#define COSINE(DTYPE, SIZE)                                                                                        \
  ATTRIBUTE static void SET(cosine_##DTYPE)(const char *x, int64_t n, double limit, double *out) {                 \
    doubles zero = {0}, sums[5][2] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}}, g[2]; \
    int64_t number = 0;                                                                                            \
    EACH_PAIR(SIZE, {                                                                                              \
      SET(load_##DTYPE)(at, g);                                                                                    \
      for (int k = 0; k < 2; k++) {                                                                                \
        doubles c = SET(clamped)(g[k], limit);                                                                     \
        sums[0][k] += g[k] * g[k];                                                                                 \
        sums[1][k] += c * c;                                                                                       \
        sums[2][k] += g[k] * c;                                                                                    \
        sums[3][k] += SET(absolute)(g[k]);                                                                         \
        sums[4][k] += SET(absolute)(c);                                                                            \
        number += SET(beyond)(g[k], limit);                                                                        \
      }                                                                                                            \
    })                                                                                                             \
    for (int k = 0; k < 5; k++) out[k] = SET(total)(sums[k], 2);                                                   \
    out[5] = (double)number;                                                                                       \
  }

#define READERS(DTYPE, SIZE) \
  SUM(DTYPE, SIZE, 1)        \
  SUM(DTYPE, SIZE, 2)        \
  SUM(DTYPE, SIZE, whole)    \
  COSINE(DTYPE, SIZE)
#endif

READERS(f32, 4)
READERS(f64, 8)
READERS(bf16, 2)
READERS(f16, 2)
