/* A decoding step: in each layer h = x + attention(norm(x)), x = h + swiglu(norm(h)) for one token per
   sequence, as in model.py, and output(norm(x)) at the end.

   Between two products of a step, PyTorch's small operators and Python's calls are slow: the weights
   have just replaced their code and data in the processor's cache. */
#pragma once

#include <stdlib.h>

#include "attention.h"
#include "half.h"
#include "quantized.h"
#include "rows.h"

/* y = x W^T for each of ``count`` matrices with k columns: of integers with this many bits and scales
   of this kind, or of 16 bits and this kind. Returns 0, or -1 without memory. */
int NAME(products)(
    const matrix *matrices, int64_t count, int bits, int kind, int64_t k, const float *x,
    int64_t rows) {
    if (bits == 16) return half_products(matrices, count, kind, k, x, rows);
    return quantized_products(matrices, count, kind, bits, k, x, rows);
}

static void add(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

/* x [rows][dim] becomes the last layer's output; if head isn't NULL, logits [rows][output.n] receives
   output(norm(x)). Row b is the token at positions[b] of slots[b], and attends to lengths[b] positions there. Slots are
   distinct. rotations: see rotate_and_store. Returns 0, -1 without memory, or -2 for a length, position
   or slot outside of the cache. */
int NAME(decode_step)(
    const layer *layers, int64_t n_layers, const head *head, const sizes *s, float *x, int64_t rows,
    const float *rotations, const int64_t *slots, const int64_t *positions, const int32_t *lengths,
    float *logits) {
    const int64_t q_dim = s->n_heads * s->head_dim, kv_dim = s->n_kv_heads * s->head_dim;
    const int bits = (int)s->bits, kind = (int)s->kind, cache_kind = (int)s->cache_kind;
    const int64_t width = s->dim + 2 * q_dim + 2 * kv_dim + 2 * s->ffn_dim;
    float *y = malloc((size_t)(rows * width) * sizeof(float));
    if (!y) return -1;
    float *q = y + rows * s->dim, *attended = q + rows * q_dim, *k = attended + rows * q_dim;
    float *v = k + rows * kv_dim, *gate = v + rows * kv_dim, *up = gate + rows * s->ffn_dim;
    int result = 0;
#define TRY(call) if ((result = (call)) != 0) break
    for (const layer *l = layers; l < layers + n_layers; l++) {
        matrix qkv[] = {l->q, l->k, l->v}, o = l->o, gated[] = {l->gate, l->up}, down = l->down;
        qkv[0].y = q, qkv[1].y = k, qkv[2].y = v, o.y = y;
        gated[0].y = gate, gated[1].y = up, down.y = y;
        rms_norm(x, l->attention_norm, (float)s->eps, rows, s->dim, y);
        TRY(NAME(products)(qkv, 3, bits, kind, s->dim, y, rows));
        TRY(rotate_and_store(
            q, k, v, rotations, rows, s->n_heads, s->n_kv_heads, s->head_dim, l->cache_k,
            l->cache_v, cache_kind, slots, positions, s->n_slots, s->max_length));
        TRY(attend_rows(
            q, l->cache_k, l->cache_v, cache_kind, slots, lengths, rows, s->n_kv_heads,
            s->n_heads / s->n_kv_heads, s->max_length, s->head_dim, attended));
        TRY(NAME(products)(&o, 1, bits, kind, q_dim, attended, rows));
        add(x, y, rows * s->dim);
        rms_norm(x, l->ffn_norm, (float)s->eps, rows, s->dim, y);
        TRY(NAME(products)(gated, 2, bits, kind, s->dim, y, rows));
        silu_product(gate, up, rows * s->ffn_dim);
        TRY(NAME(products)(&down, 1, bits, kind, s->ffn_dim, gate, rows));
        add(x, y, rows * s->dim);
    }
#undef TRY
    if (result == 0 && head) {
        matrix output = head->output;
        output.y = logits;
        rms_norm(x, head->norm, (float)s->eps, rows, s->dim, y);
        result = NAME(products)(&output, 1, (int)head->bits, (int)head->kind, s->dim, y, rows);
    }
    free(y);
    return result;
}
