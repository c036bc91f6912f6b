/* The operations of a decoding step between the products, on rows of float32: RMSNorm, the rotation of
   queries and keys with the store into the cache, and SwiGLU's product. */
#pragma once

#include <math.h>

#include "simd.h"

/* y = x / sqrt(mean(x^2) + eps) * weight for each row of x [rows][n]. */
static void rms_norm(
    const float *x, const float *weight, float eps, int64_t rows, int64_t n, float *y) {
#pragma omp parallel for schedule(static) if (rows * n > 1 << 15)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * n;
        vf sums = f_set1(0);
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sums = f_fma(f_load(from + i), f_load(from + i), sums);
        float sum = f_sum(sums);
        for (; i < n; i++) sum += from[i] * from[i];
        const float inverse = 1 / sqrtf(sum / n + eps);
        for (i = 0; i < n; i++) y[r * n + i] = from[i] * inverse * weight[i];
    }
}

/* Rotate q [rows][n_heads][head_dim] in place, and k [rows][n_kv_heads][head_dim] too; then store k
   and v in the cache [n_slots][n_kv_heads][max_length][head_dim], at slots[row] and positions[row].
   A pair of neighbours is multiplied by the complex number rotations [rows][head_dim / 2]. head_dim
   is a multiple of LANES. Returns 0, or -2 for a slot or a position outside of the cache. */
static int rotate_and_store(
    float *q, float *k, const float *v, const float *rotations, int64_t rows, int64_t n_heads,
    int64_t n_kv_heads, int64_t head_dim, void *cache_k, void *cache_v, int kind,
    const int64_t *slots, const int64_t *positions, int64_t n_slots, int64_t max_length) {
    for (int64_t t = 0; t < rows; t++)
        if (slots[t] < 0 || slots[t] >= n_slots || positions[t] < 0 || positions[t] >= max_length)
            return -2;
#pragma omp parallel for schedule(static) if (rows * n_heads * head_dim > 1 << 15)
    for (int64_t t = 0; t < rows; t++) {
        const float *by = rotations + t * head_dim;
        for (int64_t h = 0; h < n_heads + n_kv_heads; h++) {
            float *x = h < n_heads ? q + (t * n_heads + h) * head_dim
                                   : k + (t * n_kv_heads + h - n_heads) * head_dim;
            for (int64_t i = 0; i < head_dim; i += 2) {
                const float re = x[i] * by[i] - x[i + 1] * by[i + 1];
                const float im = x[i] * by[i + 1] + x[i + 1] * by[i];
                x[i] = re, x[i + 1] = im;
            }
        }
        for (int64_t h = 0; h < n_kv_heads; h++) {
            const int64_t from = (t * n_kv_heads + h) * head_dim;
            const int64_t to = ((slots[t] * n_kv_heads + h) * max_length + positions[t]) * head_dim;
            for (int64_t i = 0; i < head_dim; i += LANES) {
                f_store_kind(cache_k, kind, to + i, f_load(k + from + i));
                f_store_kind(cache_v, kind, to + i, f_load(v + from + i));
            }
        }
    }
    return 0;
}

/* silu(gate) * up = gate * up / (1 + e^-gate); f_exp is infinite from 88.4 on, as e^x in float32. */
INLINE vf gated(const float *gate, const float *up) {
    const vf g = f_load(gate);
    const vf e = f_exp(f_min(f_set1(88.7f), f_mul(f_set1(-1), g)));
    return f_mul(f_div(g, f_add(f_set1(1), e)), f_load(up));
}

/* gate [n] becomes silu(gate) * up. */
static void silu_product(float *gate, const float *up, int64_t n) {
#pragma omp parallel for schedule(static) if (n > 1 << 15)
    for (int64_t i = 0; i < n; i += LANES) {
        if (n - i >= LANES) f_store(gate + i, gated(gate + i, up + i));
        else {
            float last[2][LANES] = {0};
            memcpy(last[0], gate + i, (n - i) * sizeof(float));
            memcpy(last[1], up + i, (n - i) * sizeof(float));
            f_store(last[0], gated(last[0], last[1]));
            memcpy(gate + i, last[0], (n - i) * sizeof(float));
        }
    }
}
