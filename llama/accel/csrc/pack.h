/* Weights in integers: the choice of scales, and the order that quantized.h reads. */
#pragma once

#include <math.h>

#include "simd.h"

enum { CANDIDATES = 16 };

/* Columns from ``at`` on of a row of k numbers, as floats; 0 after its end. */
INLINE void load_group(const void *row, int kind, int64_t at, int64_t k, float *group) {
    uint32_t padded[GROUP] = {0};
    const int size = kind == F32 ? 4 : 2;
    const char *from = (const char *)row + at * size;
    if (k - at < GROUP) from = memcpy(padded, from, (k - at) * size);
    for (int i = 0; i < GROUP; i += LANES) f_store(group + i, f_load_kind(from, kind, i));
}

/* The integers nearest to w / s, in [-half, half - 1]. */
INLINE vf nearest(vf w, vf inverse, float half) {
    return f_min(f_max(f_round(f_mul(w, inverse)), f_set1(-half)), f_set1(half - 1));
}

/* The scale of a group as bfloat16. Of integers q = round(w / s) for 16 values of s around the one
   that makes the weight of largest magnitude -half, the best s for these q is sum(w q) / sum(q q),
   and leaves the squared error sum(w w) - sum(w q)^2 / sum(q q). 0 for tiny weights, whose 1 / s
   would be infinite; NaN if one is NaN or infinite. See quantize.py. */
INLINE float choose_scale(const float *w, float half) {
    float inverse[CANDIDATES], wq[CANDIDATES], qq[CANDIDATES];
    vf least = f_set1(0), most = f_set1(0), poison = f_set1(0);
    for (int i = 0; i < GROUP; i += LANES) {
        least = f_min(least, f_load(w + i));
        most = f_max(most, f_load(w + i));
        poison = f_fma(f_load(w + i), f_set1(0), poison);
    }
    if (f_sum(poison) != 0) return NAN;
    const float high = f_largest(most), low = f_largest(f_mul(least, f_set1(-1)));
    const float extreme = high > low ? high : -low;
    if (fabsf(extreme) < 1e-30f) return 0;
    const float step = half == 8 ? 0.25f : 1;
    for (int t = 0; t < CANDIDATES; t++) inverse[t] = -(half + (t - 8) * step) / extreme;
    for (int v = 0; v < CANDIDATES; v += LANES) {
        const vf scale = f_load(inverse + v);
        vf sum_wq = f_set1(0), sum_qq = f_set1(0);
        for (int i = 0; i < GROUP; i++) {
            const vf weight = f_set1(w[i]);
            const vf q = nearest(weight, scale, half);
            sum_wq = f_fma(weight, q, sum_wq);
            sum_qq = f_fma(q, q, sum_qq);
        }
        f_store(wq + v, sum_wq);
        f_store(qq + v, sum_qq);
    }
    float gain[CANDIDATES]; /* relative, as the squares of small weights are 0 */
    for (int t = 0; t < CANDIDATES; t++) gain[t] = wq[t] / extreme * (wq[t] / extreme);
    int best = 0;
    for (int t = 1; t < CANDIDATES; t++)
        if (gain[t] * qq[best] > gain[best] * qq[t]) best = t;
    return bf16_to_float(float_to_bf16(wq[best] / qq[best]));
}

/* Rows of w [n][k] as integers [n][groups * 32 * bits / 8 bytes] and bfloat16 scales [n][groups]. */
int NAME(quantize)(
    const void *w, int kind, int64_t n, int64_t k, int bits, uint8_t *packed, uint16_t *scales) {
    const int64_t n_groups = (k + GROUP - 1) / GROUP;
    const float half = bits == 8 ? 128 : 8;
#pragma omp parallel for schedule(static) if (n * k > 1 << 14)
    for (int64_t row = 0; row < n; row++) {
        for (int64_t g = 0; g < n_groups; g++) {
            float group[GROUP];
            load_group((const char *)w + row * k * (kind == F32 ? 4 : 2), kind, g * GROUP, k, group);
            const float scale = choose_scale(group, half);
            if (!(fabsf(scale) > 0)) memset(group, 0, sizeof(group)); /* 0 or NaN */
            const vf inverse = f_set1(fabsf(scale) > 0 ? 1 / scale : 0);
            for (int i = 0; i < GROUP; i += LANES)
                f_store(group + i, nearest(f_load(group + i), inverse, half));
            uint8_t q[GROUP];
            for (int i = 0; i < GROUP; i++) q[i] = (uint8_t)(int32_t)(group[i] + half);
            uint8_t *to = packed + (row * n_groups + g) * GROUP * bits / 8;
            if (bits == 8) memcpy(to, q, GROUP);
            else
                for (int i = 0; i < GROUP / 2; i++) to[i] = q[2 * i] | q[2 * i + 1] << 4;
            scales[row * n_groups + g] = float_to_bf16(scale);
        }
    }
    return 0;
}

INLINE void interleave_tile(
    const uint8_t *from, int64_t rows, int64_t width, const int size, uint8_t *to) {
    if (rows < TILE) memset(to, 0, TILE * width * size);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j++)
            memcpy(to + (j * TILE + r) * size, from + (r * width + j) * size, size);
}

/* [n][width] items of ``size`` bytes as [n / 16][width][16], with zeros after the last row. */
int NAME(interleave)(const uint8_t *from, int64_t n, int64_t width, int size, uint8_t *to) {
#pragma omp parallel for schedule(static) if (n * width > 1 << 12)
    for (int64_t first = 0; first < n; first += TILE) {
        const int64_t rows = n - first < TILE ? n - first : TILE;
        const uint8_t *source = from + first * width * size;
        uint8_t *tile = to + first * width * size;
        if (size == 4) interleave_tile(source, rows, width, 4, tile);
        else if (size == 2) interleave_tile(source, rows, width, 2, tile);
        else interleave_tile(source, rows, width, 1, tile);
    }
    return 0;
}
