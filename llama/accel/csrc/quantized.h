/* y = x W^T with W in integers of 8 or 4 bits, for any number of rows.

   Weights. W [N][K] in tiles of 16 rows: w = (q - zero) * scale for each group of 32 columns. A
   group of a tile is 16 lanes of 32 bits per vector, one lane per row, so that a vector of sums
   needs no horizontal addition and one multiply-add scales it:

     int8: 8 vectors; lane r of vector j holds columns 4j .. 4j + 3 of row r
     int4: 4 vectors; lane r of vector j holds columns 8j .. 8j + 7, the even ones in the low
           halves of the four bytes, the odd ones in the high halves

   Activations are rounded to 8 bits too, in groups of 32 with a float scale, which makes the
   products of a group exact in int32:

     y[m][n] = sum over groups of (sum of q x - zero * sum of x) * scale * x_scale

   added in float32 in the order of the groups. So a row's result depends neither on the other rows
   nor on the processor. The words of four activations are stored as [K / 4][rows] for up to
   MAX_ROWS rows: a group of the weights is unpacked once for all of them. */
#pragma once

#include <math.h>
#include <stdlib.h>

#include "simd.h"

enum { VECTORS = TILE / LANES };

/* dot adds, in each lane, the products of 4 weights and 4 activations; the weights are the stored
   unsigned integers less BASE8 or BASE4. The sums of a group start as dot_zero, and i_from_dot
   makes int32 of them. */
#if defined(__AVX512VNNI__)

#define MAX_ROWS 8
enum { BASE8 = 0, BASE4 = 0 };
INLINE vi dot8(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
INLINE vi dot4(vi sum, vi w, vi x) { return _mm512_dpbusd_epi32(sum, w, x); }
INLINE vi i_from_dot8(vi sum) { return sum; }
INLINE vi i_from_dot4(vi sum) { return sum; }

#elif defined(__AVX2__)

#define MAX_ROWS 3
enum { BASE8 = 128, BASE4 = 0 };
INLINE vi dot8(vi sum, vi w, vi x) {
    /* maddubs needs one unsigned operand, and saturates beyond 2 * 128 * 127 */
    vi q = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    vi pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vi dot4(vi sum, vi w, vi x) {
    /* 16 products of a group per int16: at most 16 * 15 * 127 < 2^15 */
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}
INLINE vi i_from_dot8(vi sum) { return sum; }
INLINE vi i_from_dot4(vi sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

#elif defined(__ARM_NEON)

#define MAX_ROWS 2
enum { BASE8 = 128, BASE4 = 0 };
INLINE vi dot4(vi sum, vi w, vi x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
INLINE vi dot8(vi sum, vi w, vi x) {
    return dot4(sum, veorq_s32(w, vdupq_n_s32((int32_t)0x80808080)), x);
}
INLINE vi i_from_dot8(vi sum) { return sum; }
INLINE vi i_from_dot4(vi sum) { return sum; }

#endif

/* Up to MAX_ROWS rows of x. words: [K / 4][n]; scales, sums: [groups][n]. */
typedef struct {
    int32_t *words;
    float *scales;
    int32_t *sums;
} activations;

typedef struct {
    const uint8_t *packed, *zero; /* zero may be NULL: 2^(bits - 1) */
    const void *scale;            /* [N / 16][groups][16] of this kind */
    int scale_kind, bits;
    int64_t n_groups;
} tiles;

/* 16 columns of y for ``rows`` rows of x. */
INLINE void tile_product(
    const tiles *w, int64_t tile, const activations *x, const int rows, const int bits, float *y,
    int64_t y_stride, int64_t n_columns) {
    const int base = bits == 8 ? BASE8 : BASE4, per_group = bits == 8 ? 8 : 4;
    vf result[MAX_ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) result[r][v] = f_set1(0);
    const int64_t bytes = (int64_t)per_group * 4 * TILE;
    const uint8_t *packed = w->packed + tile * w->n_groups * bytes;
    for (int64_t g = 0; g < w->n_groups; g++, packed += bytes) {
        const int32_t *words = x->words + g * 8 * rows;
        vi sum[MAX_ROWS][VECTORS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = i_set1(0);
        /* with the least arithmetic per byte, the hardware's prefetches alone read faster */
        if (rows > 2 || bits == 4 || LANES < 16) {
            for (int i = 0; i < bytes; i += 64) {
                if (rows == 1) __builtin_prefetch(packed + 4096 + i);
                else __builtin_prefetch(packed + 16384 + i, 0, 2);
            }
        }
        UNROLL for (int j = 0; j < per_group; j++) {
            UNROLL for (int v = 0; v < VECTORS; v++) {
                vi q = i_load(packed + (j * VECTORS + v) * LANES * 4);
                if (bits == 8) {
                    UNROLL for (int r = 0; r < rows; r++)
                        sum[r][v] = dot8(sum[r][v], q, i_set1(words[j * rows + r]));
                } else {
                    vi even = i_low_nibbles(q), odd = i_high_nibbles(q);
                    UNROLL for (int r = 0; r < rows; r++) {
                        vi s = dot4(sum[r][v], even, i_set1(words[2 * j * rows + r]));
                        sum[r][v] = dot4(s, odd, i_set1(words[(2 * j + 1) * rows + r]));
                    }
                }
            }
        }
        const int64_t index = (tile * w->n_groups + g) * TILE;
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vf scale = f_load_kind(w->scale, w->scale_kind, index + v * LANES);
            vi zero = i_set1(1 << (bits - 1));
            if (w->zero) zero = i_load_u8(w->zero + index + v * LANES);
            zero = i_sub(zero, i_set1(base));
            UNROLL for (int r = 0; r < rows; r++) {
                vi dots = bits == 8 ? i_from_dot8(sum[r][v]) : i_from_dot4(sum[r][v]);
                vi q = i_sub(dots, i_mul(zero, i_set1(x->sums[g * rows + r])));
                vf both = f_mul(scale, f_set1(x->scales[g * rows + r]));
                result[r][v] = f_fma(f_from_i(q), both, result[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float out[TILE];
        UNROLL for (int v = 0; v < VECTORS; v++) f_store(out + v * LANES, result[r][v]);
        memcpy(y + r * y_stride, out, n_columns * sizeof(float));
    }
}

/* Round row r of ``rows`` to 8 bits. A group with a NaN or an infinity gets the scale NaN, and so
   does the result; one of tiny values becomes 0, as 127 / largest would be infinite. */
INLINE void round_row(
    const float *x, int64_t k, int64_t n_groups, const int bits, const int rows, int r,
    const activations *out) {
    for (int64_t g = 0; g < n_groups; g++) {
        float group[GROUP] = {0}, largest = 0, poison = 0;
        const int64_t used = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
        memcpy(group, x + g * GROUP, used * sizeof(float));
        for (int i = 0; i < GROUP; i++) {
            const float magnitude = fabsf(group[i]);
            largest = magnitude > largest ? magnitude : largest;
            poison += group[i] * 0;
        }
        if (poison != 0) memset(group, 0, sizeof(group));
        const float inverse = largest > 1e-30f ? 127 / largest : 0;
        int32_t sum = 0;
        int8_t q[GROUP];
        for (int i = 0; i < GROUP; i++) {
            const int32_t rounded = (int32_t)nearbyintf(group[i] * inverse);
            q[i] = (int8_t)rounded;
            sum += rounded;
        }
        out->scales[g * rows + r] = largest / 127 + poison;
        out->sums[g * rows + r] = sum;
        for (int j = 0; j < 8; j++) {
            int8_t word[4];
            for (int i = 0; i < 4; i++) /* in 4 bits: even columns first, then odd ones */
                word[i] = bits == 8 ? q[4 * j + i] : q[8 * (j / 2) + 2 * i + j % 2];
            memcpy(out->words + (g * 8 + j) * rows + r, word, 4);
        }
    }
}

INLINE void tile_product_of(
    const tiles *w, int64_t tile, const activations *x, int rows, float *y, int64_t n,
    int64_t n_columns) {
    const int bits = w->bits;
#define CASE(R)                                                                  \
    case R:                                                                      \
        if (bits == 8) tile_product(w, tile, x, R, 8, y, n, n_columns);          \
        else tile_product(w, tile, x, R, 4, y, n, n_columns);                    \
        break;
    switch (rows) {
        CASE(1) CASE(2)
#if MAX_ROWS > 2
        CASE(3)
#endif
#if MAX_ROWS > 3
        CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#endif
    }
#undef CASE
}

/* y = x W^T for each of ``count`` matrices. Returns 0, or -1 without memory for the rounded x. */
static int quantized_products(
    const matrix *matrices, int64_t count, int scale_kind, int bits, int64_t k, const float *x,
    int64_t rows) {
    const int64_t n_groups = (k + GROUP - 1) / GROUP;
    const int64_t n_chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    int32_t *words = malloc((size_t)rows * n_groups * (8 + 1 + 1) * 4);
    if (!words) return -1;
    float *scales = (float *)(words + rows * n_groups * 8);
    int32_t *sums = words + rows * n_groups * 9;
#pragma omp parallel if (matrices[0].n * k > 1 << 16)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < n_chunks; c++) {
            const int64_t first = chunk_start(c, n_chunks, rows), done = first * n_groups;
            const int n_rows = (int)(chunk_start(c + 1, n_chunks, rows) - first);
            const activations out = {words + done * 8, scales + done, sums + done};
            for (int r = 0; r < n_rows; r++)
                round_row(x + (first + r) * k, k, n_groups, bits, n_rows, r, &out);
        }
        for (const matrix *m = matrices; m < matrices + count; m++) {
            const tiles w = {m->weight, m->zero, m->scale, scale_kind, bits, n_groups};
            const int64_t n = m->n;
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < (n + TILE - 1) / TILE; t++) {
                const int64_t n_columns = n - t * TILE < TILE ? n - t * TILE : TILE;
                for (int64_t c = 0; c < n_chunks; c++) {
                    const int64_t first = chunk_start(c, n_chunks, rows), done = first * n_groups;
                    const int n_rows = (int)(chunk_start(c + 1, n_chunks, rows) - first);
                    const activations in = {words + done * 8, scales + done, sums + done};
                    float *y = m->y + first * n + t * TILE;
                    tile_product_of(&w, t, &in, n_rows, y, n, n_columns);
                }
            }
        }
    }
    free(words);
    return 0;
}
