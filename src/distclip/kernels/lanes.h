/* Gradient elements to doubles, WIDTH at a time, by GNU vectors. Included once for each instruction set, which gives
 *
 *   SET(name)    the name's form in this set
 *   ATTRIBUTE    of its functions
 *   WIDTH        doubles in a vector: as many as fit a register, since gcc lowers larger ones badly
 *
 * The lanes are explicit because a compiler may not reorder a floating-point sum by itself, and the fast-math flags that let it
 * also let it assume that no NaN exists. No include guard: this file is read more than once. */
#include <stdint.h>

#define INLINE ATTRIBUTE static inline __attribute__((always_inline))
#define doubles SET(doubles)
#define longs SET(longs)
#define unsigned_longs SET(unsigned_longs)
#define floats SET(floats)
#define words SET(words)
#define numbers SET(numbers)
#define doubles_stored SET(doubles_stored)
#define floats_stored SET(floats_stored)
#define words_stored SET(words_stored)

typedef double doubles __attribute__((vector_size(8 * WIDTH)));
typedef int64_t longs __attribute__((vector_size(8 * WIDTH)));
typedef uint64_t unsigned_longs __attribute__((vector_size(8 * WIDTH)));
typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef int32_t numbers __attribute__((vector_size(4 * WIDTH)));
/* As they lie in memory: aligned to one element only. */
typedef double doubles_stored __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
typedef float floats_stored __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t words_stored __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));

INLINE doubles SET(widened)(floats x);

/* Each load reads 2 * WIDTH elements. The order of the lanes does not matter to a sum, so the halves of a word need no shuffle. */
INLINE void SET(load_f64)(const char *x, doubles *out) {
  out[0] = *(const doubles_stored *)x;
  out[1] = *(const doubles_stored *)(x + 8 * WIDTH);
}

INLINE void SET(load_f32)(const char *x, doubles *out) {
  out[0] = SET(widened)((floats)(*(const floats_stored *)x));
  out[1] = SET(widened)((floats)(*(const floats_stored *)(x + 4 * WIDTH)));
}

INLINE void SET(load_bf16)(const char *x, doubles *out) {
  words pairs = *(const words_stored *)x;
  out[0] = SET(widened)((floats)(pairs << 16));
  out[1] = SET(widened)((floats)(pairs & 0xffff0000u));
}

INLINE doubles SET(absolute)(doubles x) { return (doubles)((longs)x & INT64_MAX); }
