/* Random shapes, alignments and values for the kernels of one instruction set, against scalar code.

   check_kernels SEED N: N cases of each function. Every operand has its own heap block of exactly its
   size, at an address that is only a multiple of its numbers' size, so that the address sanitizer
   sees each access beyond it. Ends with 1 and the first wrong result; else prints a checksum of the
   results that are the same on every processor: integers, scales, and integer products. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../llama/accel/csrc/types.h"

#define JOIN(function, isa) function##_##isa
#define JOINED(function, isa) JOIN(function, isa)
#define KERNEL(function) JOINED(function, ISA)

int KERNEL(products)(const matrix *, int64_t, int, int, int64_t, const float *, int64_t);
int KERNEL(decode_step)(
    const layer *, int64_t, const head *, const sizes *, float *, int64_t, const float *,
    const int64_t *, const int64_t *, const int32_t *, float *);
int KERNEL(decode_attention)(
    const float *, const void *, const void *, int, const int32_t *, int64_t, int64_t, int64_t,
    int64_t, int64_t, float *);
int KERNEL(quantize)(const void *, int, int64_t, int64_t, int, uint8_t *, uint16_t *);
int KERNEL(interleave)(const uint8_t *, int64_t, int64_t, int, uint8_t *);

enum { MAX_BLOCKS = 256 };
static const int SIZES[] = {2, 2, 4};

static uint64_t state, checksum = 14695981039346656037u;
static const char *what = "";
static char shape[200];

static void check(int right, const char *message) {
    if (right) return;
    printf("%s: %s (%s)\n", what, message, shape);
    exit(1);
}

static void count(const void *bytes, int64_t n) {
    for (int64_t i = 0; i < n; i++) checksum = (checksum ^ ((const uint8_t *)bytes)[i]) * 1099511628211u;
}

static uint64_t next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}
/* From 0 to n - 1. */
static int64_t below(int64_t n) { return (int64_t)((next() >> 16) % (uint64_t)n); }
/* Between -1 and 1, closer to 0 than uniform. */
static float random_float(void) {
    const float u = (float)(below(1 << 20) + 1) / (1 << 20);
    return (below(2) ? u : -u) * (float)(below(1 << 20) + 1) / (1 << 20);
}

static void *blocks[MAX_BLOCKS];
static int n_blocks;
/* A block of ``n`` items at an address that is a multiple of ``size``. */
static void *block(int64_t n, int size) {
    const int64_t offset = below(64 / size) * size;
    check(n_blocks < MAX_BLOCKS, "too many blocks");
    char *p = malloc((size_t)(n * size + offset));
    check(p != NULL, "no memory");
    memset(p, 255, (size_t)(n * size + offset)); /* NaN in all kinds */
    blocks[n_blocks++] = p;
    return p + offset;
}
/* A copy of ``n`` items in a block of its own. */
static void *copy_of(const void *from, int64_t n, int size) {
    return memcpy(block(n, size), from, (size_t)(n * size));
}
static void free_blocks(void) {
    while (n_blocks) free(blocks[--n_blocks]);
}

static float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float get(const void *p, int kind, int64_t i) {
    if (kind == BF16) return from_bf16(((const uint16_t *)p)[i]);
    if (kind == F32) return ((const float *)p)[i];
    _Float16 h;
    memcpy(&h, (const char *)p + 2 * i, 2);
    return (float)h;
}
static void put(void *p, int kind, int64_t i, float f) {
    const uint16_t bf16 = to_bf16(f);
    const _Float16 f16 = (_Float16)f;
    if (kind == BF16) memcpy((char *)p + 2 * i, &bf16, 2);
    else if (kind == F16) memcpy((char *)p + 2 * i, &f16, 2);
    else memcpy((char *)p + 4 * i, &f, 4);
}
static void *random_block(int64_t n, int kind, float scale) {
    void *p = block(n, SIZES[kind]);
    for (int64_t i = 0; i < n; i++) put(p, kind, i, random_float() * scale);
    return p;
}
/* Mostly near 1; sometimes tiny or huge numbers, within float16's range if ``kind`` is. */
static float random_scale(int kind) {
    const float scales[] = {1, 1, 1, 1e-4f, 1e4f, 1e-7f, 1e-20f, 1e-36f, 1e-39f, 1e15f};
    return scales[below(kind == F16 ? 6 : 10)];
}

/* Rows of activations; ``bad`` is one with a NaN or an infinity, or -1. */
static float *random_rows(int64_t rows, int64_t k, int64_t *bad) {
    float *x = random_block(rows * k, F32, random_scale(F32));
    *bad = rows && below(4) == 0 ? below(rows) : -1;
    const float values[] = {NAN, INFINITY, -INFINITY};
    if (*bad >= 0) x[*bad * k + below(k)] = values[below(3)];
    return x;
}

/* 1 to ``largest``, often one of the sizes around a multiple of a vector or a tile. */
static int64_t random_size(int64_t largest) {
    if (below(2)) return 1 + below(largest);
    const int64_t n = (below(largest / 32) + 1) * 32 + below(3) - 1;
    return n > largest ? largest : n;
}
static int64_t random_count(void) { return below(4) ? below(9) : below(41); }

#if defined(__AVX512BF16__)
/* AVX512-BF16 takes denormal numbers as 0. */
static float flushed(float f) { return fabsf(f) < 0x1p-126f ? 0 : f; }
#endif

/* For each of some matrices, a block for the result of one row. */
static matrix *for_one_row(const matrix *matrices, int64_t n_matrices) {
    matrix *result = copy_of(matrices, n_matrices * (int64_t)sizeof(matrix) / 8, 8);
    for (int64_t i = 0; i < n_matrices; i++) result[i].y = block(result[i].n, 4);
    return result;
}
static matrix *new_matrices(int64_t n_matrices) {
    return block(n_matrices * (int64_t)sizeof(matrix) / 8, 8);
}
static matrix random_half(int64_t n, int64_t k, int kind, float scale) {
    return (matrix){random_block(n * k, kind, scale), NULL, NULL, NULL, n};
}

static void fuzz_half(void) {
    what = "products in 16 bits";
    const int64_t n_matrices = 1 + below(3), k = random_size(320), rows = random_count();
    const int kind = below(2) ? BF16 : F16;
    int64_t bad;
    const float *x = random_rows(rows, k, &bad);
    matrix *matrices = new_matrices(n_matrices);
    for (matrix *w = matrices; w < matrices + n_matrices; w++) {
        *w = random_half(random_size(160), k, kind, random_scale(kind));
        w->y = block(rows * w->n, 4);
    }
    snprintf(
        shape, sizeof shape, "matrices %d, first n %d, k %d, rows %d, kind %d", (int)n_matrices,
        (int)matrices[0].n, (int)k, (int)rows, kind);
    const matrix *alone = for_one_row(matrices, n_matrices);
    check(KERNEL(products)(matrices, n_matrices, 16, kind, k, x, rows) == 0, "no memory");
    for (int64_t m = 0; m < rows; m++) {
        check(KERNEL(products)(alone, n_matrices, 16, kind, k, x + m * k, 1) == 0, "no memory");
        for (int64_t c = 0; c < n_matrices; c++) {
            const int64_t n = matrices[c].n;
            const float *y = matrices[c].y + m * n;
            for (int64_t i = 0; i < n; i++) {
                double sum = 0, size = 0;
                for (int64_t j = 0; j < k; j++) {
                    float value = x[m * k + j], weight = get(matrices[c].weight, kind, i * k + j);
#if defined(__AVX512BF16__)
                    if (kind == BF16) {
                        value = flushed(from_bf16(to_bf16(value)));
                        weight = flushed(weight);
                    }
#endif
                    const double product = (double)value * weight;
                    sum += product;
                    size += fabs(product);
                }
                if (m == bad) check(!isfinite(y[i]), "a NaN or an infinity was lost");
                else check(fabs(y[i] - sum) <= 5e-6 * size + 1e-36, "a wrong sum");
            }
            if (m != bad) check(!memcmp(alone[c].y, y, (size_t)n * 4), "a row depends on others");
        }
    }
}

/* A group of activations in 8 bits; returns its scale. */
static float round_group(const float *x, int64_t used, int32_t *q) {
    float largest = 0;
    int is_finite = 1;
    for (int64_t i = 0; i < used; i++) {
        is_finite &= isfinite(x[i]);
        largest = fmaxf(largest, fabsf(x[i]));
    }
    for (int64_t i = 0; i < GROUP; i++) {
        const int is_used = i < used && is_finite && largest > 1e-30f;
        q[i] = is_used ? (int32_t)nearbyintf(x[i] * (127 / largest)) : 0;
    }
    return is_finite ? largest / 127 : NAN;
}

/* Integers [n][k] and their scales by rows; ``zero`` may be NULL. */
typedef struct {
    const uint8_t *packed, *zero;
    const void *scale;
} quantized;

/* A matrix for the kernel, in tiles; its rows in ``rows``, unless that is NULL. */
static matrix random_quantized(
    int64_t n, int64_t k, int bits, int kind, int has_zero, float size, quantized *rows) {
    const int64_t n_groups = (k + GROUP - 1) / GROUP, n_tiles = (n + TILE - 1) / TILE;
    const int64_t row_bytes = n_groups * GROUP * bits / 8;
    uint8_t *packed = block(n * row_bytes, 1), *zero = block(n * n_groups, 1);
    for (int64_t i = 0; i < n * row_bytes; i++) packed[i] = (uint8_t)next();
    for (int64_t i = 0; i < n * n_groups; i++) zero[i] = (uint8_t)below(1 << bits);
    const void *scale = random_block(n * n_groups, kind, size);
    /* the last tile's padding isn't read by the reference, but by the kernel */
    uint8_t *packed_tiles = block(n_tiles * TILE * row_bytes / 4, 4);
    uint8_t *zero_tiles = block(n_tiles * TILE * n_groups, 1);
    uint8_t *scale_tiles = block(n_tiles * TILE * n_groups, SIZES[kind]);
    KERNEL(interleave)(packed, n, row_bytes / 4, 4, packed_tiles);
    KERNEL(interleave)(zero, n, n_groups, 1, zero_tiles);
    KERNEL(interleave)(scale, n, n_groups, SIZES[kind], scale_tiles);
    if (rows) *rows = (quantized){packed, has_zero ? zero : NULL, scale};
    return (matrix){packed_tiles, scale_tiles, has_zero ? zero_tiles : NULL, NULL, n};
}

/* Row i of W times x [k], added in the kernel's order. */
static float quantized_sum(
    const quantized *w, int64_t i, int64_t k, int bits, int kind, const float *x) {
    const int64_t n_groups = (k + GROUP - 1) / GROUP, row_bytes = n_groups * GROUP * bits / 8;
    float result = 0;
    for (int64_t g = 0; g < n_groups; g++) {
        int32_t q[GROUP], sum = 0;
        const int64_t left = k - g * GROUP, at = i * n_groups + g;
        const float x_scale = round_group(x + g * GROUP, left < GROUP ? left : GROUP, q);
        const int32_t middle = w->zero ? w->zero[at] : 1 << (bits - 1);
        for (int j = 0; j < GROUP; j++) {
            const uint8_t byte = w->packed[i * row_bytes + (g * GROUP + j) * bits / 8];
            const int32_t weight = bits == 8 ? byte : j % 2 ? byte >> 4 : byte & 15;
            sum += (weight - middle) * q[j];
        }
        result = fmaf((float)sum, get(w->scale, kind, at) * x_scale, result);
    }
    return result;
}

static void fuzz_quantized(void) {
    what = "products of integers";
    const int64_t n_matrices = 1 + below(3), k = random_size(320), rows = random_count();
    const int kind = (int)below(3), bits = below(2) ? 8 : 4;
    int64_t bad;
    const float *x = random_rows(rows, k, &bad);
    matrix *matrices = new_matrices(n_matrices);
    quantized by_rows[3];
    for (int64_t c = 0; c < n_matrices; c++) {
        const int64_t n = random_size(below(8) ? 70 : 300);
        const int has_zero = (int)below(2);
        matrices[c] = random_quantized(n, k, bits, kind, has_zero, random_scale(F16), &by_rows[c]);
        matrices[c].y = block(rows * n, 4);
    }
    snprintf(
        shape, sizeof shape, "matrices %d, first n %d, k %d, rows %d, kind %d, bits %d",
        (int)n_matrices, (int)matrices[0].n, (int)k, (int)rows, kind, bits);
    const matrix *alone = for_one_row(matrices, n_matrices);
    check(KERNEL(products)(matrices, n_matrices, bits, kind, k, x, rows) == 0, "no memory");
    for (int64_t m = 0; m < rows; m++) {
        check(KERNEL(products)(alone, n_matrices, bits, kind, k, x + m * k, 1) == 0, "no memory");
        for (int64_t c = 0; c < n_matrices; c++) {
            const int64_t n = matrices[c].n;
            const float *y = matrices[c].y + m * n;
            for (int64_t i = 0; i < n; i++) {
                const float expected = quantized_sum(&by_rows[c], i, k, bits, kind, x + m * k);
                if (m == bad)
                    check(isnan(y[i]) && isnan(expected), "a NaN or an infinity was lost");
                else check(y[i] == expected, "a wrong sum");
            }
            if (m == bad) continue; /* processors have different NaNs */
            check(!memcmp(alone[c].y, y, (size_t)n * 4), "a row depends on others");
            count(y, n * 4);
        }
    }
}

/* The squared error of integers and a scale for ``n`` weights. */
static double error_of(const float *w, int64_t n, const int32_t *q, float scale) {
    double error = 0;
    for (int64_t i = 0; i < n; i++) error += pow(w[i] - (double)q[i] * scale, 2);
    return error;
}

static void fuzz_quantize(void) {
    what = "quantize";
    const int64_t n = random_size(70), k = random_size(320), n_groups = (k + GROUP - 1) / GROUP;
    const int kind = (int)below(3), bits = below(2) ? 8 : 4, half = 1 << (bits - 1);
    const int64_t row_bytes = n_groups * GROUP * bits / 8;
    snprintf(shape, sizeof shape, "n %d, k %d, kind %d, bits %d", (int)n, (int)k, kind, bits);
    const float size = random_scale(kind);
    void *w = random_block(n * k, kind, size);
    const int64_t bad = below(4) ? -1 : below(n * k);
    if (bad >= 0) put(w, kind, bad, below(2) ? NAN : INFINITY);
    uint8_t *packed = block(n * row_bytes, 1);
    uint16_t *scales = block(n * n_groups, 2);
    check(KERNEL(quantize)(w, kind, n, k, bits, packed, scales) == 0, "no memory");
    for (int64_t i = 0; i < n; i++)
        for (int64_t g = 0; g < n_groups; g++) {
            float weights[GROUP];
            int32_t q[GROUP], nearest[GROUP], nothing[GROUP] = {0};
            float extreme = 0, largest = 0;
            const int64_t used = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
            const float scale = from_bf16(scales[i * n_groups + g]);
            for (int64_t j = 0; j < GROUP; j++) {
                const uint8_t byte = packed[i * row_bytes + (g * GROUP + j) * bits / 8];
                q[j] = (bits == 8 ? byte : j % 2 ? byte >> 4 : byte & 15) - half;
                if (j >= used) check(q[j] == 0, "padding isn't 0");
                else weights[j] = get(w, kind, i * k + g * GROUP + j);
            }
            const int64_t first = i * k + g * GROUP;
            if (first <= bad && bad < first + used) {
                check(isnan(scale), "the scale of a NaN or an infinity isn't NaN");
                scales[i * n_groups + g] = 0; /* processors have different NaNs */
                continue;
            }
            for (int64_t j = 0; j < used; j++)
                if (fabsf(weights[j]) > largest || weights[j] == -largest) {
                    extreme = weights[j];
                    largest = fabsf(extreme);
                }
            if (largest < 1e-30f) {
                check(scale == 0, "the scale of tiny weights isn't 0");
                continue;
            }
            const float plain = from_bf16(to_bf16(-extreme / half));
            for (int64_t j = 0; j < used; j++)
                nearest[j] = (int32_t)fminf(nearbyintf(weights[j] / plain), half - 1);
            const double limit = error_of(weights, used, nearest, plain);
            /* by chance, and by the rounding of the scale, it may be a little larger */
            const double rounding = error_of(weights, used, nothing, 0) / (1 << 16);
            const double chance = bits == 8 ? 1.5 : 1.05;
            check(
                error_of(weights, used, q, scale) <= chance * limit + rounding,
                "the search made it worse");
        }
    count(packed, n * row_bytes);
    count(scales, n * n_groups * 2);
}

static void fuzz_interleave(void) {
    what = "interleave";
    const int size = 1 << below(3);
    const int64_t n = random_size(200), width = random_size(64);
    snprintf(shape, sizeof shape, "n %d, width %d, size %d", (int)n, (int)width, size);
    const int64_t n_tiles = (n + TILE - 1) / TILE;
    uint8_t *from = block(n * width * size, 1), *to = block(n_tiles * TILE * width * size, 1);
    for (int64_t i = 0; i < n * width * size; i++) from[i] = (uint8_t)next();
    KERNEL(interleave)(from, n, width, size, to);
    for (int64_t i = 0; i < n_tiles * TILE; i++)
        for (int64_t j = 0; j < width; j++) {
            const uint8_t nothing[4] = {0};
            const uint8_t *expected = i < n ? from + (i * width + j) * size : nothing;
            const uint8_t *got = to + ((i / TILE * width + j) * TILE + i % TILE) * size;
            check(!memcmp(expected, got, (size_t)size), "a wrong item");
        }
}

/* One head of one row in float64. */
static void attend(
    const float *q, const void *k, const void *v, int kind, int64_t at, int64_t length,
    int64_t head_dim, double *y) {
    double scores[128], most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < length; t++) {
        scores[t] = 0;
        for (int64_t i = 0; i < head_dim; i++)
            scores[t] += (double)q[i] * get(k, kind, at + t * head_dim + i) / sqrt((double)head_dim);
        most = fmax(most, scores[t]);
    }
    for (int64_t t = 0; t < length; t++) sum += scores[t] = exp(scores[t] - most);
    for (int64_t i = 0; i < head_dim; i++) {
        y[i] = 0;
        for (int64_t t = 0; t < length; t++)
            y[i] += scores[t] / sum * get(v, kind, at + t * head_dim + i);
    }
}

static void fuzz_attention(void) {
    what = "decode_attention";
    const int64_t rows = below(5), n_kv_heads = 1 + below(3), n_queries = 1 + below(8);
    const int64_t max_length = 1 + below(below(2) ? 8 : 90), head_dim = 16 * (1 + below(16));
    const int kind = (int)below(3);
    snprintf(
        shape, sizeof shape, "rows %d, heads %d x %d, length %d, head_dim %d, kind %d", (int)rows,
        (int)n_kv_heads, (int)n_queries, (int)max_length, (int)head_dim, kind);
    const int64_t n_heads = n_kv_heads * n_queries, size = n_heads * head_dim;
    const int64_t n = rows * n_kv_heads * max_length * head_dim;
    /* sharp and flat distributions; positions that aren't used hold NaN */
    const float sharpness = below(2) ? 1 : 30;
    float *q = random_block(rows * size, F32, sharpness), *y = block(rows * size, 4);
    void *k = block(n, SIZES[kind]), *v = block(n, SIZES[kind]);
    int32_t *lengths = block(rows, 4);
    for (int64_t b = 0; b < rows; b++) {
        lengths[b] = (int32_t)(below(16) ? 1 + below(max_length) : below(2) * max_length);
        for (int64_t i = 0; i < n_kv_heads * lengths[b] * head_dim; i++) {
            const int64_t head = i / (lengths[b] * head_dim), rest = i % (lengths[b] * head_dim);
            const int64_t at = (b * n_kv_heads + head) * max_length * head_dim + rest;
            put(k, kind, at, random_float());
            put(v, kind, at, random_float());
        }
    }
    const int64_t bad = rows && below(4) == 0 ? below(rows * n_heads) : -1;
    if (bad >= 0) q[bad * head_dim + below(head_dim)] = below(2) ? NAN : INFINITY;
    int result = KERNEL(decode_attention)(
        q, k, v, kind, lengths, rows, n_kv_heads, n_queries, max_length, head_dim, y);
    check(result == 0, "no memory");
    for (int64_t i = 0; i < rows * n_heads; i++) {
        double expected[256];
        const int64_t b = i / n_heads, at = i / n_queries * max_length * head_dim;
        attend(q + i * head_dim, k, v, kind, at, lengths[b], head_dim, expected);
        for (int64_t j = 0; j < head_dim; j++) {
            const float got = y[i * head_dim + j];
            if (lengths[b] == 0) check(got == 0, "without keys it isn't 0");
            else if (i == bad) check(isnan(got), "a NaN or an infinity was lost");
            else check(fabs(got - expected[j]) <= 2e-5, "a wrong result");
        }
    }
    if (rows == 0) return;
    lengths[rows - 1] = (int32_t)(below(2) ? max_length + 1 : -1);
    result = KERNEL(decode_attention)(
        q, k, v, kind, lengths, rows, n_kv_heads, n_queries, max_length, head_dim, y);
    check(result == -2, "a wrong length is accepted");
}

/* --- A step --- */

/* A step's operands; the layers' caches are as before it. */
typedef struct {
    const layer *layers;
    int64_t n_layers, rows;
    const head *head; /* or NULL */
    const sizes *s;
    const float *x, *rotations;
    const int64_t *slots, *positions;
    const int32_t *lengths;
} step;

static int64_t cache_size(const sizes *s) {
    return s->n_slots * s->n_kv_heads * s->max_length * s->head_dim;
}
/* The caches of layer l: keys if ``i`` is 0, else values. */
static char *cache_of(const layer *layers, int64_t l, int i) {
    return i ? layers[l].cache_v : layers[l].cache_k;
}

/* Run ``rows`` rows from ``first`` on, with copies of the caches in ``layers``; returns the error. */
static int run_step(
    const step *t, int64_t first, int64_t rows, layer **layers, float **x, float **logits) {
    const int64_t dim = t->s->dim, head_dim = t->s->head_dim;
    const int cache_kind = (int)t->s->cache_kind;
    *layers = copy_of(t->layers, t->n_layers * (int64_t)sizeof(layer) / 8, 8);
    for (layer *l = *layers; l < *layers + t->n_layers; l++) {
        l->cache_k = copy_of(l->cache_k, cache_size(t->s), SIZES[cache_kind]);
        l->cache_v = copy_of(l->cache_v, cache_size(t->s), SIZES[cache_kind]);
    }
    *x = copy_of(t->x + first * dim, rows * dim, 4);
    const float *rotations = copy_of(t->rotations + first * head_dim, rows * head_dim, 4);
    const int64_t *slots = copy_of(t->slots + first, rows, 8);
    const int64_t *positions = copy_of(t->positions + first, rows, 8);
    const int32_t *lengths = copy_of(t->lengths + first, rows, 4);
    *logits = t->head ? block(rows * t->head->output.n, 4) : NULL;
    return KERNEL(decode_step)(
        *layers, t->n_layers, t->head, t->s, *x, rows, rotations, slots, positions, lengths, *logits);
}

/* y = W x in float64. */
static void multiply(const matrix *w, int kind, int64_t k, const double *x, double *y) {
    for (int64_t i = 0; i < w->n; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < k; j++) y[i] += get(w->weight, kind, i * k + j) * x[j];
    }
}

static void normalize(const double *x, const float *weight, double eps, int64_t n, double *y) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    for (int64_t i = 0; i < n; i++) y[i] = x[i] / sqrt(sum / (double)n + eps) * weight[i];
}

static void rotate(double *x, const float *by, int64_t n_heads, int64_t head_dim) {
    for (int64_t i = 0; i < n_heads * head_dim; i += 2) {
        const double a = x[i], b = x[i + 1], c = by[i % head_dim], d = by[i % head_dim + 1];
        x[i] = a * c - b * d;
        x[i + 1] = a * d + b * c;
    }
}

/* Compare row b with float64: the entries that the kernel has stored in the caches of ``after``, and
   x. Attention reads what is stored, so that each entry's rounding counts once.

   Numbers are about 1, and LIMIT is 170 times float32's rounding of 1: sums have up to 384 terms,
   and a norm may scale x up. Entries are rounded to the cache's kind too. */
#define LIMIT 1e-5
static void check_row(const step *t, int64_t b, const layer *after, const float *x) {
    const sizes *s = t->s;
    const int kind = (int)s->kind, cache_kind = (int)s->cache_kind;
    const int64_t dim = s->dim, head_dim = s->head_dim, per_key = s->n_heads / s->n_kv_heads;
    const double rounding = cache_kind == BF16 ? 0x1p-8 : cache_kind == F16 ? 0x1p-11 : 0;
    double h[128], y[128], q[512], entries[2][512], attended[512], gate[128], up[128];
    for (int64_t i = 0; i < dim; i++) h[i] = t->x[b * dim + i];
    for (int64_t l = 0; l < t->n_layers; l++) {
        const layer *w = t->layers + l;
        normalize(h, w->attention_norm, s->eps, dim, y);
        multiply(&w->q, kind, dim, y, q);
        multiply(&w->k, kind, dim, y, entries[0]);
        multiply(&w->v, kind, dim, y, entries[1]);
        rotate(q, t->rotations + b * head_dim, s->n_heads, head_dim);
        rotate(entries[0], t->rotations + b * head_dim, s->n_kv_heads, head_dim);
        for (int64_t head = 0; head < s->n_kv_heads; head++) {
            const int64_t start = (t->slots[b] * s->n_kv_heads + head) * s->max_length * head_dim;
            for (int i = 0; i < 2; i++)
                for (int64_t j = 0; j < head_dim; j++) {
                    const double expected = entries[i][head * head_dim + j];
                    const int64_t at = start + t->positions[b] * head_dim + j;
                    const double got = get(cache_of(after, l, i), cache_kind, at);
                    const double limit = LIMIT + rounding * fabs(expected);
                    check(fabs(got - expected) <= limit, i ? "a wrong value" : "a wrong key");
                }
            for (int64_t i = head * per_key; i < (head + 1) * per_key; i++) {
                float query[32];
                for (int64_t j = 0; j < head_dim; j++) query[j] = (float)q[i * head_dim + j];
                attend(
                    query, after[l].cache_k, after[l].cache_v, cache_kind, start, t->lengths[b],
                    head_dim, attended + i * head_dim);
            }
        }
        multiply(&w->o, kind, s->n_heads * head_dim, attended, y);
        for (int64_t i = 0; i < dim; i++) h[i] += y[i];
        normalize(h, w->ffn_norm, s->eps, dim, y);
        multiply(&w->gate, kind, dim, y, gate);
        multiply(&w->up, kind, dim, y, up);
        for (int64_t i = 0; i < s->ffn_dim; i++) gate[i] *= up[i] / (1 + exp(-gate[i]));
        multiply(&w->down, kind, s->ffn_dim, gate, y);
        for (int64_t i = 0; i < dim; i++) h[i] += y[i];
    }
    for (int64_t i = 0; i < dim; i++) check(fabs(x[i] - h[i]) <= LIMIT, "a wrong result");
}

/* Compare a row's logits with float64's from the kernel's x. */
static void check_logits(const step *t, const float *x, const float *logits) {
    double wide[128], y[128], expected[64];
    for (int64_t i = 0; i < t->s->dim; i++) wide[i] = x[i];
    normalize(wide, t->head->norm, t->s->eps, t->s->dim, y);
    multiply(&t->head->output, F16, t->s->dim, y, expected);
    for (int64_t i = 0; i < t->head->output.n; i++)
        check(fabs(logits[i] - expected[i]) <= LIMIT, "a wrong logit");
}

/* After ``rows`` rows from ``first`` on, the caches of ``after`` hold at the place of row b what
   those of alone[b] do, which is finite, and else what they did before. */
static void check_caches(
    const step *t, int64_t first, int64_t rows, const layer *after, layer *const *alone) {
    const sizes *s = t->s;
    const int kind = (int)s->cache_kind;
    const int64_t bytes = s->head_dim * SIZES[kind];
    for (int64_t at = 0; at < s->n_slots * s->n_kv_heads * s->max_length; at++) {
        int64_t owner = -1;
        for (int64_t b = first; b < first + rows; b++)
            if (at / s->max_length / s->n_kv_heads == t->slots[b] &&
                at % s->max_length == t->positions[b])
                owner = b;
        for (int64_t l = 0; l < t->n_layers; l++)
            for (int i = 0; i < 2; i++) {
                const char *got = cache_of(after, l, i) + at * bytes;
                const char *wanted =
                    cache_of(owner < 0 ? t->layers : alone[owner], l, i) + at * bytes;
                check(
                    !memcmp(got, wanted, (size_t)bytes),
                    owner < 0 ? "another position has changed" : "an entry depends on other rows");
                for (int64_t j = 0; owner >= 0 && j < s->head_dim; j++)
                    check(isfinite(get(got, kind, j)), "an entry isn't finite");
            }
    }
}

static matrix random_matrix(int64_t n, int64_t k, int bits, int kind) {
    /* so that results are about 1: random_float's deviation is 1/3, that of the integers
       2^bits / sqrt(12) or with zeros 2^bits / sqrt(6) */
    const float scale = 3 / sqrtf((float)k);
    if (bits == 16) return random_half(n, k, kind, scale);
    return random_quantized(n, k, bits, kind, (int)below(2), scale * 3 / (1 << bits), NULL);
}

static float *random_norm(int64_t n) {
    float *weight = random_block(n, F32, 0.5f);
    for (int64_t i = 0; i < n; i++) weight[i] += 1;
    return weight;
}

static void fuzz_step(void) {
    what = "decode_step";
    const int64_t rows = below(10), n_layers = 1 + below(2), n_kv_heads = 1 + below(3);
    const int64_t n_slots = rows + below(3) + (rows == 0), max_length = 1 + below(12);
    const int bits = 4 << below(3), kind = (int)below(bits == 16 ? 2 : 3);
    sizes *s = block(sizeof(sizes) / 8, 8);
    *s = (sizes){
        .dim = 1 + below(90), .n_heads = n_kv_heads * (1 + below(4)), .n_kv_heads = n_kv_heads,
        .head_dim = 16 * (1 + below(2)), .ffn_dim = 1 + below(90), .n_slots = n_slots,
        .max_length = max_length, .bits = bits, .kind = kind, .cache_kind = below(3),
        .eps = below(2) ? 1e-3 : 0.5};
    const int64_t dim = s->dim, head_dim = s->head_dim, ffn_dim = s->ffn_dim;
    const int64_t q_dim = s->n_heads * head_dim, kv_dim = n_kv_heads * head_dim;
    const int cache_kind = (int)s->cache_kind;
    snprintf(
        shape, sizeof shape,
        "rows %d, layers %d, dim %d, ffn_dim %d, heads %d of %d x %d, slots %d x %d, bits %d, "
        "kinds %d, %d",
        (int)rows, (int)n_layers, (int)dim, (int)ffn_dim, (int)n_kv_heads, (int)s->n_heads,
        (int)head_dim, (int)n_slots, (int)max_length, bits, kind, cache_kind);

    int64_t *slots = block(rows, 8), *positions = block(rows, 8), order[16];
    int32_t *lengths = block(rows, 4);
    for (int64_t i = 0; i < n_slots; i++) { /* shuffled */
        const int64_t j = below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    float *rotations = block(rows * head_dim, 4);
    for (int64_t b = 0; b < rows; b++) {
        slots[b] = order[b];
        positions[b] = below(max_length);
        lengths[b] = (int32_t)positions[b] + 1;
        for (int64_t i = 0; i < head_dim; i += 2) {
            const double angle = (double)positions[b] * pow(0.5, (double)i);
            rotations[b * head_dim + i] = (float)cos(angle);
            rotations[b * head_dim + i + 1] = (float)sin(angle);
        }
    }
    layer *layers = block(n_layers * (int64_t)sizeof(layer) / 8, 8);
    for (layer *l = layers; l < layers + n_layers; l++) {
        *l = (layer){
            .q = random_matrix(q_dim, dim, bits, kind), .k = random_matrix(kv_dim, dim, bits, kind),
            .v = random_matrix(kv_dim, dim, bits, kind), .o = random_matrix(dim, q_dim, bits, kind),
            .gate = random_matrix(ffn_dim, dim, bits, kind),
            .up = random_matrix(ffn_dim, dim, bits, kind),
            .down = random_matrix(dim, ffn_dim, bits, kind), .attention_norm = random_norm(dim),
            .ffn_norm = random_norm(dim), .cache_k = block(cache_size(s), SIZES[cache_kind]),
            .cache_v = block(cache_size(s), SIZES[cache_kind])};
        /* positions that aren't used hold NaN */
        for (int64_t b = 0; b < rows; b++)
            for (int64_t i = 0; i < n_kv_heads * positions[b] * head_dim; i++) {
                const int64_t per_head = positions[b] * head_dim;
                const int64_t head = slots[b] * n_kv_heads + i / per_head;
                const int64_t at = head * max_length * head_dim + i % per_head;
                put(l->cache_k, cache_kind, at, 2 * random_float());
                put(l->cache_v, cache_kind, at, 2 * random_float());
            }
    }
    const float *x = random_block(rows * dim, F32, 2);
    head *last = below(4) ? block(sizeof(head) / 8, 8) : NULL;
    if (last) {
        const int head_bits = 4 << below(3), head_kind = (int)below(head_bits == 16 ? 2 : 3);
        *last = (head){
            .norm = random_norm(dim), .bits = head_bits, .kind = head_kind,
            .output = random_matrix(1 + below(64), dim, head_bits, head_kind)};
    }
    const step t = {layers, n_layers, rows, last, s, x, rotations, slots, positions, lengths};

    layer *together, *alone[9];
    float *y, *y_alone, *logits, *logits_alone;
    check(run_step(&t, 0, rows, &together, &y, &logits) == 0, "no memory");
    for (int64_t b = 0; b < rows; b++) {
        for (int64_t i = 0; i < dim; i++) check(isfinite(y[b * dim + i]), "x isn't finite");
        if (bits == 16 && kind == F16) check_row(&t, b, together, y + b * dim);
        check(run_step(&t, b, 1, &alone[b], &y_alone, &logits_alone) == 0, "no memory");
        check(!memcmp(y_alone, y + b * dim, (size_t)dim * 4), "a row depends on others");
        if (last) {
            const int64_t n = last->output.n;
            const float *own = logits + b * n;
            check(!memcmp(logits_alone, own, (size_t)n * 4), "logits depend on other rows");
            for (int64_t i = 0; i < n; i++) check(isfinite(own[i]), "a logit isn't finite");
            if (last->bits == 16 && last->kind == F16) check_logits(&t, y + b * dim, own);
        }
        check_caches(&t, b, 1, alone[b], alone);
    }
    check_caches(&t, 0, rows, together, alone);
    if (rows == 0) return;
    const int64_t b = below(rows), is_negative = below(2);
    switch (below(3)) {
    case 0: slots[b] = is_negative ? -1 : n_slots; break;
    case 1: positions[b] = is_negative ? -1 : max_length; break;
    default: lengths[b] = is_negative ? -1 : (int32_t)max_length + 1;
    }
    check(run_step(&t, 0, rows, &together, &y, &logits) == -2, "a place outside of the cache is accepted");
    check(!memcmp(y, x, (size_t)(rows * dim) * 4), "x has changed despite the error");
}

int main(int argc, char **argv) {
    check(argc == 3, "usage: check_kernels SEED N");
    void (*const functions[])(void) = {
        fuzz_half,       fuzz_quantized, fuzz_quantize,
        fuzz_interleave, fuzz_attention, fuzz_step};
    for (int f = 0; f < 6; f++)
        for (int i = 0; i < atoi(argv[2]); i++) {
            state = (uint64_t)(atoll(argv[1]) * 1000003 + f * 8191 + i + 1) * 0x9e3779b97f4a7c15u;
            functions[f]();
            free_blocks();
        }
    printf("%016llx\n", (unsigned long long)checksum);
    return 0;
}
