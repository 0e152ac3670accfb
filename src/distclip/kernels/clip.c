/* One pass over a list of gradients, shared between any number of threads.
 *
 * A tensor is cut into blocks of BLOCK elements, each with its own partial result; a chunk is a run of blocks that one thread
 * claims at a time. The partials of a tensor are combined in order, so results do not depend on who computed what. */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>

#include "edits.h"
#include "plain.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>

#include "avx2.h"
#include "avx512.h"
#include "half.h"
#else
#define X86 0
#endif

#define BLOCK ((int64_t)1 << 16)    /* elements: fixed, since it decides the order of a sum */
#define CHUNK ((int64_t)1 << 18)    /* bytes */
#define PER_TENSOR 256              /* bytes that could be read in the time that a tensor costs by itself */
#define COLUMNS 6                   /* doubles of a partial */
#define ALONE ((int64_t)1 << 19)    /* bytes that one thread reads before another has woken up */
#define LANES 8                     /* sums side by side: fewer roundings in a row, and they fit a vector */

enum { SUMS, CLAMPED_SUMS, SCALE, CLAMP };
enum { F32, F64, BF16, F16 };
static const int64_t SIZES[] = {4, 8, 2, 2};

typedef struct {
  int64_t tensor, block, part; /* where it starts; part: how many blocks of tensors with several come before */
} chunk;

typedef struct {
  /* the same at every call */
  int64_t tensors, chunks;
  const int64_t *counts;
  const uint8_t *dtypes;
  const chunk *starts;
  double *parts;
  /* of this call */
  int64_t operation, stride;
  double p;
  const uint64_t *pointers;
  const double *values;
  double *out;
  _Atomic int64_t next, done;
} job;

typedef double sum_function(const char *, int64_t, double);
typedef double clamped_function(const char *, int64_t, double, double);
typedef void cosine_function(const char *, int64_t, double, double *);
typedef void edit_function(char *, int64_t, double);

#define ALL(F) {F##_f32, F##_f64, F##_bf16, F##_f16}
#define ALL_OF(F, SET) {F##_f32_##SET, F##_f64_##SET, F##_bf16_##SET, F##_f16_##SET}
#define SUMS_OF(SET) {ALL_OF(sum_1, SET), ALL_OF(sum_2, SET), ALL_OF(sum_whole, SET), ALL(sum_any), ALL(sum_max)}
enum { ONE, TWO, WHOLE, ANY, MAX };

typedef struct {
  sum_function *sum[5][4];
  cosine_function *cosine[4];
} readers;

static const readers PLAIN = {SUMS_OF(plain), ALL_OF(cosine, plain)}, *best = &PLAIN;
static clamped_function *const CLAMPED_ANY[4] = ALL(clamped_any);
static edit_function *scale_of[4] = ALL(scale), *clamp_of[4] = ALL(clamp);
#if X86
static const readers AVX2 = {SUMS_OF(avx2), ALL_OF(cosine, avx2)}, AVX512 = {SUMS_OF(avx512), ALL_OF(cosine, avx512)};
#endif

/* Chooses among the instruction sets of this machine, up to the `most`th. Called before anything else. Returns which it is:
 * 0 plain, 1 AVX2, 2 AVX-512. */
int64_t distclip_choose(int64_t most) {
#if X86
  unsigned a, b, c, d;
  int f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  int found = !f16c || !__builtin_cpu_supports("avx2") ? 0 : __builtin_cpu_supports("avx512f") ? 2 : 1;
  if (found > most) found = (int)most;
  best = found == 2 ? &AVX512 : found ? &AVX2 : &PLAIN;
  scale_of[BF16] = found ? scale_bf16_avx2 : scale_bf16;
  clamp_of[BF16] = found ? clamp_bf16_avx2 : clamp_bf16;
  scale_of[F16] = found ? scale_f16c : scale_f16;
  clamp_of[F16] = found ? clamp_f16c : clamp_f16;
  return found;
#else
  (void)most;
  return 0;
#endif
}

static int kind_of(double p) {
  if (isinf(p)) return MAX;
  if (p == 1) return ONE;
  if (p == 2) return TWO;
  return p == floor(p) && p <= 8 ? WHOLE : ANY;
}

static int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

/* A value as the tensor's own arithmetic sees it: float32 but for float64 gradients. */
static double value_of(const job *j, int64_t tensor) {
  double value = j->values[j->stride * tensor];
  return j->dtypes[tensor] == F64 ? value : (double)(float)value;
}

static int untouched(const job *j, int64_t tensor) {
  if (!j->pointers[tensor] || !j->counts[tensor]) return 1;
  if (j->operation == SCALE) return value_of(j, tensor) == 1;
  return j->operation == CLAMP && value_of(j, tensor) == INFINITY;
}

static void clamped_sums(const job *j, int64_t tensor, const char *x, int64_t n, double *out) {
  int kind = kind_of(j->p), dtype = j->dtypes[tensor];
  double limit = value_of(j, tensor), nan = isnan(limit) ? limit : 0, found[6];
  best->cosine[dtype](x, n, limit, found);
  memcpy(out + 2, found, 3 * sizeof *found);
  out[5] = found[5];
  if (kind == ONE || kind == TWO) {
    memcpy(out, kind == ONE ? found + 3 : found, 2 * sizeof *found);
  } else { /* the block is read again from the cache */
    out[0] = best->sum[kind][dtype](x, n, j->p);
    out[1] = kind == MAX ? (out[0] > limit ? limit : out[0]) : CLAMPED_ANY[dtype](x, n, j->p, limit);
  }
  out[1] += nan;
  out[3] += nan;
  out[4] += nan;
}

static void one_block(const job *j, int64_t tensor, int64_t block, double *out) {
  int dtype = j->dtypes[tensor];
  int64_t first = block * BLOCK, left = j->counts[tensor] - first, n = left < BLOCK ? left : BLOCK;
  char *x = (char *)(uintptr_t)j->pointers[tensor] + first * SIZES[dtype];
  if (j->operation == SUMS) {
    *out = best->sum[kind_of(j->p)][dtype](x, n, j->p);
  } else if (j->operation == CLAMPED_SUMS) {
    clamped_sums(j, tensor, x, n, out);
  } else {
    double value = value_of(j, tensor);
    /* torch.minimum and maximum answer NaN to a NaN limit */
    (j->operation == CLAMP && !isnan(value) ? clamp_of : scale_of)[dtype](x, n, value);
  }
}

static void one_chunk(const job *j, int64_t index) {
  chunk at = j->starts[index], end = j->starts[index + 1];
  int64_t width = j->operation == SUMS ? 1 : COLUMNS;
  for (; at.tensor < end.tensor || (at.tensor == end.tensor && at.block < end.block); at.tensor++, at.block = 0) {
    int64_t blocks = blocks_of(j->counts[at.tensor]), last = at.tensor == end.tensor ? end.block : blocks;
    int skip = untouched(j, at.tensor);
    for (; at.block < last; at.block++) {
      double *out = blocks > 1 ? j->parts + COLUMNS * at.part++ : j->out + width * at.tensor;
      if (!skip) one_block(j, at.tensor, at.block, out);
    }
  }
}

static void combine(const job *j) {
  int64_t width = j->operation == SUMS ? 1 : COLUMNS, maxima = isinf(j->p) ? (width == 1 ? 1 : 2) : 0, part = 0;
  for (int64_t tensor = 0; tensor < j->tensors; tensor++) {
    int64_t blocks = blocks_of(j->counts[tensor]);
    double *out = j->out + width * tensor;
    int none = untouched(j, tensor);
    if (none || blocks > 1) memset(out, 0, sizeof(double) * (size_t)width);
    if (blocks <= 1) continue;
    for (int64_t block = 0; block < blocks && !none; block++)
      for (int64_t column = 0; column < width; column++) {
        double found = j->parts[COLUMNS * (part + block) + column];
        if (column >= maxima) out[column] += found;
        else if (!(found <= out[column]) && !isnan(out[column])) out[column] = found;
      }
    part += blocks;
  }
}

/* Cuts a list into chunks and writes their starts and one end, unless `starts` is NULL. Returns their number; `parts` receives how
 * many partials are needed. */
int64_t distclip_cut(int64_t tensors, const int64_t *counts, const uint8_t *dtypes, chunk *starts, int64_t *parts) {
  int64_t chunks = 0, part = 0, weight = CHUNK; /* full: the first block opens a chunk */
  for (int64_t tensor = 0; tensor < tensors; tensor++) {
    int64_t blocks = blocks_of(counts[tensor]);
    for (int64_t block = 0; block < blocks; block++) {
      if (weight >= CHUNK) {
        if (starts) starts[chunks] = (chunk){tensor, block, part};
        chunks++;
        weight = 0;
      }
      int64_t left = counts[tensor] - block * BLOCK;
      weight += PER_TENSOR + SIZES[dtypes[tensor]] * (left < BLOCK ? left : BLOCK);
      if (blocks > 1) part++;
    }
  }
  if (starts) starts[chunks] = (chunk){tensors, 0, part};
  *parts = part;
  return chunks;
}

int64_t distclip_job_size(void) { return sizeof(job); }

void distclip_bind(job *j, int64_t tensors, const int64_t *counts, const uint8_t *dtypes, int64_t chunks, const chunk *starts,
                   double *parts) {
  memset(j, 0, sizeof *j);
  j->tensors = tensors;
  j->counts = counts;
  j->dtypes = dtypes;
  j->chunks = chunks;
  j->starts = starts;
  j->parts = parts;
  atomic_store(&j->next, chunks); /* nothing to claim yet */
}

void distclip_help(job *j);
void distclip_close(job *j);

/* Opens a call. Before this a late helper of the previous call finds nothing to claim. Returns whether helpers are worth their
 * while: then distclip_close ends the call, else it is done already. */
int64_t distclip_open(job *j, int64_t operation, double p, const uint64_t *pointers, const double *values, int64_t stride, double *out) {
  j->operation = operation;
  j->p = p;
  j->pointers = pointers;
  j->values = values;
  j->stride = stride;
  j->out = out;
  int64_t bytes = 0;
  for (int64_t tensor = 0; tensor < j->tensors; tensor++)
    if (!untouched(j, tensor)) bytes += PER_TENSOR + j->counts[tensor] * SIZES[j->dtypes[tensor]];
  atomic_store(&j->done, 0);
  atomic_store(&j->next, bytes ? 0 : j->chunks);
  if (!bytes) atomic_store(&j->done, j->chunks);
  if (bytes > ALONE) return 1;
  distclip_close(j);
  return 0;
}

/* A helper: claims chunks until none is left. It may come late, when the call is over. */
void distclip_help(job *j) {
  int64_t index;
  while ((index = atomic_fetch_add(&j->next, 1)) < j->chunks) {
    /* what is written was read just before: from the end, whose last megabytes are in the cache still */
    one_chunk(j, j->out ? index : j->chunks - 1 - index);
    atomic_fetch_add(&j->done, 1);
  }
}

/* The caller: does its share, waits for the chunks that helpers hold (at most one each), combines. */
void distclip_close(job *j) {
  distclip_help(j);
  while (atomic_load(&j->done) < j->chunks) sched_yield();
  if (j->out) combine(j);
}

/* out[row] = Σ weights[row][i] · values[i]. */
void distclip_weigh(int64_t rows, int64_t n, const double *weights, const double *values, double *out) {
  for (int64_t row = 0; row < rows; row++, weights += n) {
    double lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      for (int64_t k = 0; k < LANES; k++) lane[k] += weights[i + k] * values[i + k];
    for (; i < n; i++) lane[i % LANES] += weights[i] * values[i];
    for (int64_t half = LANES / 2; half; half /= 2)
      for (int64_t k = 0; k < half; k++) lane[k] += lane[k + half];
    out[row] = lane[0];
  }
}
