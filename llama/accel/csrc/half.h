/* y = x W^T with W [N][K] in bfloat16 or float16, as stored in the file, for any number of rows.

   Each product of a row of W and a row of x has CHAINS vectors of partial sums, so that it doesn't
   depend on the other rows. Tiles of some rows of W and up to MAX_HALF_ROWS rows of x share every
   load. A tile reads several rows of W at once, but prefetches the memory behind it in order, into
   the second-level cache: 8 rows are 1.3 to 1.7 times as fast as with prefetches row by row. One
   row of x that fits into the first-level cache needs no tiles with AVX2, and none in bfloat16 with
   AVX512-BF16: W is read from start to end. The processor prefetches it, but only within a page of
   4 KiB; prefetching the first lines of every 4 KiB, two pages ahead, makes a step 2 to 5 % faster.

   x is float32, in blocks of WIDTH columns, [K / WIDTH][rows][WIDTH]: rows a power of two apart in
   memory would compete for the same cache lines. With AVX512-BF16, x is rounded to bfloat16 for
   bfloat16 weights; products of two of them are exact, and the sums float32. Denormal numbers (below
   1.2e-38) count as 0 there. */
#pragma once

#include <stdlib.h>

#include "simd.h"

/* WIDTH columns per step; HEIGHT(rows) rows of W in a tile, about as many as have registers.
   PAGE_LINES: cache lines to prefetch per page for one row of x; 0: it takes tiles. */
#if defined(__AVX512F__)
#define MAX_HALF_ROWS 8
enum { CHAINS = 1, PAGE_LINES = 0 };
#define HEIGHT(rows) 4
#elif defined(__AVX2__)
#define MAX_HALF_ROWS 3
enum { CHAINS = 2, PAGE_LINES = 4 };
#define HEIGHT(rows) 2
#elif defined(__ARM_NEON)
#define MAX_HALF_ROWS 6
enum { CHAINS = 2, PAGE_LINES = 0 };
#define HEIGHT(rows) ((rows) <= 2 ? 4 : 2)
#endif

#if defined(__AVX512BF16__)
enum { WIDTH = 2 * LANES, BF16_X_SIZE = 2, BF16_PAGE_LINES = 8 };
typedef vi bf16s;
INLINE vi load_bf16(const uint16_t *p) { return i_load(p); }
INLINE void dot_bf16(vf *sum, vi w, const uint8_t *x) {
    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)w, (__m512bh)i_load(x));
}
#else
enum { WIDTH = CHAINS * LANES, BF16_X_SIZE = 4, BF16_PAGE_LINES = PAGE_LINES };
typedef struct {
    vf chain[CHAINS];
} bf16s;
INLINE bf16s load_bf16(const uint16_t *p) {
    bf16s w;
    for (int c = 0; c < CHAINS; c++) w.chain[c] = f_from_bf16(p + c * LANES);
    return w;
}
INLINE void dot_bf16(vf *sum, bf16s w, const uint8_t *x) {
    for (int c = 0; c < CHAINS; c++)
        sum[c] = f_fma(w.chain[c], f_load((const float *)x + c * LANES), sum[c]);
}
#endif

typedef struct {
    vf part[WIDTH / LANES];
} f16s;
INLINE f16s load_f16(const uint16_t *p) {
    f16s w;
    for (int i = 0; i < WIDTH / LANES; i++) w.part[i] = f_from_f16(p + i * LANES);
    return w;
}
INLINE void dot_f16(vf *sum, f16s w, const uint8_t *x) {
    for (int i = 0; i < WIDTH / LANES; i++)
        sum[i % CHAINS] = f_fma(w.part[i], f_load((const float *)x + i * LANES), sum[i % CHAINS]);
}

#define DEFINE_TILE(KIND)                                                                 \
    INLINE void KIND##_tile(                                                              \
        const uint16_t *w, int64_t k, const uint8_t *x, const int rows, const int height, \
        const int x_size, float *y, int64_t n) {                                          \
        vf sum[MAX_HALF_ROWS][4][CHAINS];                                                 \
        UNROLL for (int r = 0; r < rows; r++)                                             \
            UNROLL for (int i = 0; i < height; i++)                                       \
                for (int c = 0; c < CHAINS; c++) sum[r][i][c] = f_set1(0);                \
        const uint16_t *ahead = w + height * k + 8192; /* numbers */                      \
        for (int64_t at = 0; at < k; at += WIDTH, x += rows * WIDTH * x_size) {           \
            KIND##s weights[4];                                                           \
            UNROLL for (int i = 0; i < height; i++) {                                     \
                if (k - at < WIDTH) {                                                     \
                    uint16_t tail[WIDTH] = {0};                                           \
                    memcpy(tail, w + i * k + at, (k - at) * sizeof(uint16_t));            \
                    weights[i] = load_##KIND(tail);                                       \
                } else {                                                                  \
                    weights[i] = load_##KIND(w + i * k + at);                             \
                    if (height > 1) __builtin_prefetch(ahead + i * WIDTH, 0, 2);          \
                }                                                                         \
            }                                                                             \
            UNROLL for (int r = 0; r < rows; r++)                                         \
                UNROLL for (int i = 0; i < height; i++)                                   \
                    dot_##KIND(sum[r][i], weights[i], x + r * WIDTH * x_size);            \
            ahead += height * WIDTH;                                                      \
        }                                                                                 \
        UNROLL for (int r = 0; r < rows; r++)                                             \
            UNROLL for (int i = 0; i < height; i++) {                                     \
                vf total = sum[r][i][0];                                                  \
                for (int c = 1; c < CHAINS; c++) total = f_add(total, sum[r][i][c]);      \
                y[r * n + i] = f_sum(total);                                              \
            }                                                                             \
    }
DEFINE_TILE(bf16)
DEFINE_TILE(f16)
#undef DEFINE_TILE

enum { PAGE = 2048 }; /* numbers */

/* Columns begin to end of y for ``rows`` rows of x. */
INLINE void half_columns(
    const uint16_t *w, const int is_bf16, int64_t begin, int64_t end, int64_t k, const uint8_t *x,
    const int rows, float *y, int64_t n) {
    const int x_size = is_bf16 ? BF16_X_SIZE : 4;
    const int n_lines = rows == 1 && k <= 4096 ? (is_bf16 ? BF16_PAGE_LINES : PAGE_LINES) : 0;
    const int height = n_lines ? 1 : HEIGHT(rows);
    int64_t i = begin;
    for (; i + height <= end; i += height) {
        if (n_lines)
            for (int64_t page = 0; page < k; page += PAGE)
                UNROLL for (int line = 0; line < n_lines; line++)
                    __builtin_prefetch(w + i * k + page + 2 * PAGE + line * 32, 0, 2);
        if (is_bf16) bf16_tile(w + i * k, k, x, rows, height, x_size, y + i, n);
        else f16_tile(w + i * k, k, x, rows, height, x_size, y + i, n);
    }
    for (; i < end; i++)
        if (is_bf16) bf16_tile(w + i * k, k, x, rows, 1, x_size, y + i, n);
        else f16_tile(w + i * k, k, x, rows, 1, x_size, y + i, n);
}

/* Copy rows ``first`` to ``after`` of x in blocks of WIDTH columns; see above. */
INLINE void copy_rows(
    const float *x, int64_t k, int64_t first, int64_t after, const int x_size, uint8_t *to) {
    for (int64_t at = 0; at < k; at += WIDTH)
        for (int64_t m = first; m < after; m++, to += WIDTH * x_size) {
            float values[WIDTH] = {0};
            const int64_t left = k - at;
            memcpy(values, x + m * k + at, (left < WIDTH ? left : WIDTH) * sizeof(float));
            if (x_size == 4) memcpy(to, values, sizeof(values));
            else
                for (int i = 0; i < WIDTH; i++) {
                    const uint16_t h = float_to_bf16(values[i]);
                    memcpy(to + 2 * i, &h, 2);
                }
        }
}

/* y = x W^T for each of ``count`` matrices. Returns 0, or -1 without memory for the copy of x. */
static int half_products(
    const matrix *matrices, int64_t count, int kind, int64_t k, const float *x, int64_t rows) {
    const int is_bf16 = kind == BF16;
    const int64_t n_steps = (k + WIDTH - 1) / WIDTH;
    const int64_t n_chunks = (rows + MAX_HALF_ROWS - 1) / MAX_HALF_ROWS;
    const int x_size = is_bf16 ? BF16_X_SIZE : 4;
    const int64_t row_bytes = n_steps * WIDTH * x_size;
    uint8_t *copy = aligned_alloc(64, (size_t)(rows * row_bytes + 63) / 64 * 64);
    if (!copy) return -1;
#pragma omp parallel if (matrices[0].n * k > 1 << 15)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < n_chunks; c++) {
            const int64_t first = chunk_start(c, n_chunks, rows);
            const int64_t after = chunk_start(c + 1, n_chunks, rows);
            copy_rows(x, k, first, after, x_size, copy + first * row_bytes);
        }
        for (const matrix *m = matrices; m < matrices + count; m++) {
            const uint16_t *w = m->weight;
            const int64_t n = m->n;
            /* for every chunk of x while some rows of W are in cache */
#pragma omp for schedule(static) nowait
            for (int64_t begin = 0; begin < n; begin += 16) {
                const int64_t end = n < begin + 16 ? n : begin + 16;
                for (int64_t c = 0; c < n_chunks; c++) {
                    const int64_t first = chunk_start(c, n_chunks, rows);
                    const uint8_t *chunk = copy + first * row_bytes;
                    float *out = m->y + first * n;
#define CASE(R)                                                           \
    case R:                                                               \
        if (is_bf16) half_columns(w, 1, begin, end, k, chunk, R, out, n); \
        else half_columns(w, 0, begin, end, k, chunk, R, out, n);         \
        break;
                    switch (chunk_start(c + 1, n_chunks, rows) - first) {
                        CASE(1) CASE(2) CASE(3)
#if MAX_HALF_ROWS > 3
                        CASE(4) CASE(5) CASE(6)
#endif
#if MAX_HALF_ROWS > 6
                        CASE(7) CASE(8)
#endif
                    }
#undef CASE
                }
            }
        }
    }
    free(copy);
    return 0;
}
