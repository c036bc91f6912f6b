/* The operands of the kernels, without vectors: csrc and its callers share them. */
#pragma once

#include <stdint.h>

/* Of numbers in memory. */
enum { BF16, F16, F32 };
/* Rows in a tile of integer weights, columns in a group. */
enum { TILE = 16, GROUP = 32 };

/* A weight [n][k], and y [rows][n] = x [rows][k] W^T for it. Those of one call have the same x, k and
   format; scale and zero are those of quantized.h. */
typedef struct {
    const void *weight, *scale;
    const uint8_t *zero;
    float *y;
    int64_t n;
} matrix;

/* A layer of a decoding step. Norms are float32 [dim]. */
typedef struct {
    matrix q, k, v, o, gate, up, down;
    const float *attention_norm, *ffn_norm;
    void *cache_k, *cache_v; /* [n_slots][n_kv_heads][max_length][head_dim] */
} layer;

/* The last norm, with the layers' eps, and the output layer, whose format may be another one. */
typedef struct {
    const float *norm;
    matrix output;
    int64_t bits, kind;
} head;

typedef struct {
    int64_t dim, n_heads, n_kv_heads, head_dim, ffn_dim, n_slots, max_length;
    int64_t bits, kind, cache_kind; /* of the layers' matrices and caches */
    double eps;
} sizes;
