/* The attention of a decoding step: softmax(q k^T / sqrt(D)) v for one query per sequence, with
   keys and values in float32, bfloat16 or float16, as stored in the cache.

   The query heads that share a key head are computed together, so that keys and values are read
   once. Each sequence reads its own length. */
#pragma once

#include <math.h>
#include <stdlib.h>

#include "simd.h"

/* A tile has the scores of up to HEADS queries and KEYS keys, or the sums of up to HEADS queries and
   PARTS vectors of VALUES values: as many scores and sums as have registers. */
enum { KEYS = 4, PARTS = 4, VALUES = 16 };
#if defined(__AVX2__) && !defined(__AVX512F__)
enum { HEADS = 2 };
#else
enum { HEADS = 4 };
#endif

/* Prefetch as much as ``count`` rows from item ``at`` on, 8 KiB ahead: rows are read in order. */
INLINE void prefetch_rows(
    const void *cache, const int kind, int64_t at, int64_t count, int64_t head_dim) {
    const int size = kind == F32 ? 4 : 2;
    const char *ahead = (const char *)cache + at * size + 8192;
    for (int64_t i = 0; i < count * head_dim * size; i += 64) __builtin_prefetch(ahead + i, 0, 2);
}

/* The scores of ``heads`` queries and ``keys`` keys, from item ``at`` of the cache on. */
INLINE void score_tile(
    const float *q, const void *k, const int kind, int64_t at, const int heads, const int keys,
    int64_t head_dim, float *scores, int64_t padded) {
    vf sum[HEADS][KEYS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int t = 0; t < keys; t++) sum[h][t] = f_set1(0);
    for (int64_t i = 0; i < head_dim; i += LANES) {
        vf key[KEYS];
        UNROLL for (int t = 0; t < keys; t++) key[t] = f_load_kind(k, kind, at + t * head_dim + i);
        UNROLL for (int h = 0; h < heads; h++) {
            const vf query = f_load(q + h * head_dim + i);
            UNROLL for (int t = 0; t < keys; t++) sum[h][t] = f_fma(key[t], query, sum[h][t]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        if (keys == KEYS) f_sum_4(sum[h], scores + h * padded);
        else scores[h * padded] = f_sum(sum[h][0]);
}

/* y += the weighted sums of ``count`` values, for ``heads`` queries and ``parts`` vectors. */
INLINE void value_tile(
    const float *weights, int64_t padded, const void *v, const int kind, int64_t at, int64_t count,
    const int heads, const int parts, int64_t head_dim, float *y) {
    vf sum[HEADS][PARTS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int p = 0; p < parts; p++) sum[h][p] = f_load(y + h * head_dim + p * LANES);
    for (int64_t t = 0; t < count; t++, at += head_dim) {
        vf value[PARTS];
        UNROLL for (int p = 0; p < parts; p++) value[p] = f_load_kind(v, kind, at + p * LANES);
        UNROLL for (int h = 0; h < heads; h++) {
            const vf weight = f_set1(weights[h * padded + t]);
            UNROLL for (int p = 0; p < parts; p++) sum[h][p] = f_fma(weight, value[p], sum[h][p]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int p = 0; p < parts; p++) f_store(y + h * head_dim + p * LANES, sum[h][p]);
}

/* Scores [padded] to softmax weights, of the scores times scale. */
INLINE void softmax(float *scores, int64_t length, int64_t padded, float scale) {
    for (int64_t t = length; t < padded; t++) scores[t] = -INFINITY;
    vf most = f_set1(-INFINITY), sum = f_set1(0);
    for (int64_t t = 0; t < padded; t += LANES) most = f_max(most, f_load(scores + t));
    const vf offset = f_set1(-f_largest(most));
    for (int64_t t = 0; t < padded; t += LANES) {
        const vf e = f_exp(f_mul(f_add(f_load(scores + t), offset), f_set1(scale)));
        f_store(scores + t, e);
        sum = f_add(sum, e);
    }
    const vf inverse = f_set1(1 / f_sum(sum));
    for (int64_t t = 0; t < padded; t += LANES)
        f_store(scores + t, f_mul(f_load(scores + t), inverse));
}

/* One key head of one sequence. q, y: [n_queries][head_dim]; scores: room for
   n_queries * padded. */
INLINE void attend_head(
    const float *q, const void *k, const void *v, const int kind, int64_t at, int64_t length,
    int64_t n_queries, int64_t head_dim, float *scores, int64_t padded, float *y) {
    for (int64_t t = 0, keys; t < length; t += keys) {
        keys = length - t >= KEYS ? KEYS : 1;
        const int64_t first = at + t * head_dim;
        prefetch_rows(k, kind, first, keys, head_dim);
        for (int64_t h = 0, heads; h < n_queries; h += heads) {
            heads = n_queries - h >= HEADS ? HEADS : 1;
            const float *query = q + h * head_dim;
            float *to = scores + h * padded + t;
#define TILE_OF(H, T) score_tile(query, k, kind, first, H, T, head_dim, to, padded)
            if (heads == HEADS && keys == KEYS) TILE_OF(HEADS, KEYS);
            else if (heads == HEADS) TILE_OF(HEADS, 1);
            else if (keys == KEYS) TILE_OF(1, KEYS);
            else TILE_OF(1, 1);
#undef TILE_OF
        }
    }
    for (int64_t h = 0; h < n_queries; h++)
        softmax(scores + h * padded, length, padded, 1 / sqrtf((float)head_dim));
    memset(y, 0, n_queries * head_dim * sizeof(float));
    for (int64_t t = 0; t < length; t += VALUES) {
        const int64_t count = length - t >= VALUES ? VALUES : length - t;
        prefetch_rows(v, kind, at + t * head_dim, count, head_dim);
        for (int64_t h = 0, heads; h < n_queries; h += heads) {
            heads = n_queries - h >= HEADS ? HEADS : 1;
            const float *weights = scores + h * padded + t;
            for (int64_t i = 0, parts; i < head_dim; i += parts * LANES) {
                parts = head_dim - i >= PARTS * LANES ? PARTS : 1;
                const int64_t first = at + t * head_dim + i;
                float *to = y + h * head_dim + i;
#define TILE_OF(H, P) value_tile(weights, padded, v, kind, first, count, H, P, head_dim, to)
                if (heads == HEADS && parts == PARTS) TILE_OF(HEADS, PARTS);
                else if (heads == HEADS) TILE_OF(HEADS, 1);
                else if (parts == PARTS) TILE_OF(1, PARTS);
                else TILE_OF(1, 1);
#undef TILE_OF
            }
        }
    }
}

/* y [rows][n_kv_heads * n_queries][head_dim]. Row b attends to the first lengths[b] positions of
   k and v [n_slots][n_kv_heads][max_length][head_dim], in slots[b], or in slot b if slots is NULL.
   head_dim is a multiple of LANES. Returns 0, -1 without memory for the scores,
   or -2 for a length that isn't from 0 to max_length. */
static int attend_rows(
    const float *q, const void *k, const void *v, int kind, const int64_t *slots,
    const int32_t *lengths, int64_t rows, int64_t n_kv_heads, int64_t n_queries,
    int64_t max_length, int64_t head_dim, float *y) {
    int64_t longest = 0;
    for (int64_t b = 0; b < rows; b++) {
        if (lengths[b] < 0 || lengths[b] > max_length) return -2;
        longest = lengths[b] > longest ? lengths[b] : longest;
    }
    const int64_t padded = (longest + LANES - 1) / LANES * LANES, size = n_queries * head_dim;
    float *scores = malloc((size_t)(rows * n_kv_heads * n_queries * padded) * sizeof(float));
    if (!scores) return -1;
    /* dynamic: rows have different lengths */
#pragma omp parallel for schedule(dynamic) if (rows * longest * size > 1 << 14)
    for (int64_t i = 0; i < rows * n_kv_heads; i++) {
        const int64_t b = i / n_kv_heads, length = lengths[b], slot = slots ? slots[b] : b;
        const int64_t at = (slot * n_kv_heads + i % n_kv_heads) * max_length * head_dim;
        float *own = scores + i * n_queries * padded;
        const int64_t used = (length + LANES - 1) / LANES * LANES;
#define CASE(KIND)                                                                              \
    case KIND:                                                                                  \
        attend_head(                                                                            \
            q + i * size, k, v, KIND, at, length, n_queries, head_dim, own, used, y + i * size); \
        break;
        switch (kind) { CASE(BF16) CASE(F16) CASE(F32) }
#undef CASE
    }
    free(scores);
    return 0;
}

int NAME(decode_attention)(
    const float *q, const void *k, const void *v, int kind, const int32_t *lengths, int64_t rows,
    int64_t n_kv_heads, int64_t n_queries, int64_t max_length, int64_t head_dim, float *y) {
    return attend_rows(
        q, k, v, kind, NULL, lengths, rows, n_kv_heads, n_queries, max_length, head_dim, y);
}
