/* The attention of a decoding step: softmax(q k^T / sqrt(D)) v for one query per sequence, with
   keys and values in float32, bfloat16 or float16, as stored in the cache.

   The query heads that share a key head are computed together, so that keys and values are read
   once. Each sequence reads its own length. */
#pragma once

#include <math.h>
#include <stdlib.h>

#include "simd.h"

enum { MAX_HEAD_DIM = 256 };

/* A row as floats. Rows are read in order: one some steps ahead is fetched. */
INLINE void load_row(const void *cache, int kind, int64_t at, int head_dim, float *row) {
    const int size = kind == F32 ? 4 : 2;
    const char *ahead = (const char *)cache + (at + 32 * head_dim) * size;
    for (int i = 0; i < head_dim * size; i += 64) __builtin_prefetch(ahead + i);
    for (int i = 0; i < head_dim; i += LANES) f_store(row + i, f_load_kind(cache, kind, at + i));
}

/* scores [length] to softmax weights; padded to a multiple of LANES with -inf by the caller. */
INLINE void softmax(float *scores, int64_t padded) {
    vf most = f_set1(-INFINITY), sum = f_set1(0);
    for (int64_t t = 0; t < padded; t += LANES) most = f_max(most, f_load(scores + t));
    const vf offset = f_set1(-f_largest(most));
    for (int64_t t = 0; t < padded; t += LANES) {
        const vf e = f_exp(f_add(f_load(scores + t), offset));
        f_store(scores + t, e);
        sum = f_add(sum, e);
    }
    const vf inverse = f_set1(1 / f_sum(sum));
    for (int64_t t = 0; t < padded; t += LANES)
        f_store(scores + t, f_mul(f_load(scores + t), inverse));
}

/* The scores of a query and ``count`` keys, 4 or 1. */
INLINE void dot_keys(
    const float *q, float keys[][MAX_HEAD_DIM], const int count, int head_dim, float scale,
    float *scores) {
    vf sums[4];
    UNROLL for (int c = 0; c < count; c++) sums[c] = f_set1(0);
    for (int i = 0; i < head_dim; i += LANES)
        UNROLL for (int c = 0; c < count; c++)
            sums[c] = f_fma(f_load(keys[c] + i), f_load(q + i), sums[c]);
    if (count == 4) f_sum_4(sums, scores);
    else scores[0] = f_sum(sums[0]);
    UNROLL for (int c = 0; c < count; c++) scores[c] *= scale;
}

/* y += the weighted sum of ``count`` values. */
INLINE void add_values(
    const float *weights, float values[][MAX_HEAD_DIM], const int count, int head_dim, float *y) {
    vf by[4];
    UNROLL for (int c = 0; c < count; c++) by[c] = f_set1(weights[c]);
    for (int i = 0; i < head_dim; i += LANES) {
        vf sum = f_load(y + i);
        UNROLL for (int c = 0; c < count; c++) sum = f_fma(by[c], f_load(values[c] + i), sum);
        f_store(y + i, sum);
    }
}

/* One key head of one sequence. q, y: [n_queries][head_dim]; scores: room for
   n_queries * padded. */
INLINE void attend_head(
    const float *q, const void *k, const void *v, int kind, int64_t at, int64_t length,
    int n_queries, int head_dim, float *scores, int64_t padded, float *y) {
    float rows[4][MAX_HEAD_DIM];
    const float scale = 1 / sqrtf((float)head_dim);
    for (int64_t t = 0, count; t < length; t += count) {
        count = length - t >= 4 ? 4 : 1;
        for (int c = 0; c < count; c++)
            load_row(k, kind, at + (t + c) * head_dim, head_dim, rows[c]);
        for (int h = 0; h < n_queries; h++) {
            float *to = scores + h * padded + t;
            if (count == 4) dot_keys(q + h * head_dim, rows, 4, head_dim, scale, to);
            else dot_keys(q + h * head_dim, rows, 1, head_dim, scale, to);
        }
    }
    for (int h = 0; h < n_queries; h++) {
        for (int64_t t = length; t < padded; t++) scores[h * padded + t] = -INFINITY;
        softmax(scores + h * padded, padded);
        for (int i = 0; i < head_dim; i++) y[h * head_dim + i] = 0;
    }
    for (int64_t t = 0, count; t < length; t += count) {
        count = length - t >= 4 ? 4 : 1;
        for (int c = 0; c < count; c++)
            load_row(v, kind, at + (t + c) * head_dim, head_dim, rows[c]);
        for (int h = 0; h < n_queries; h++) {
            const float *by = scores + h * padded + t;
            if (count == 4) add_values(by, rows, 4, head_dim, y + h * head_dim);
            else add_values(by, rows, 1, head_dim, y + h * head_dim);
        }
    }
}

/* y [rows][n_kv_heads * n_queries][head_dim]. Row b attends to the first lengths[b] positions of
   k and v [n_slots][n_kv_heads][max_length][head_dim], in slots[b], or in slot b if slots is NULL.
   head_dim is a multiple of LANES, up to MAX_HEAD_DIM. Returns 0, -1 without memory for the scores,
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
        attend_head(
            q + i * size, k, v, kind, at, length, (int)n_queries, (int)head_dim, own, used,
            y + i * size);
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
