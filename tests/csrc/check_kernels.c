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

#define JOIN(function, isa) function##_##isa
#define JOINED(function, isa) JOIN(function, isa)
#define KERNEL(function) JOINED(function, ISA)

int KERNEL(half_product)(
    const uint16_t *, int, int64_t, int64_t, const float *, int64_t, float *);
int KERNEL(quantized_product)(
    const uint8_t *, const void *, int, const uint8_t *, int, int64_t, int64_t, const float *,
    int64_t, float *);
int KERNEL(decode_attention)(
    const float *, const void *, const void *, int, const int32_t *, int64_t, int64_t, int64_t,
    int64_t, int64_t, float *);
int KERNEL(quantize)(const void *, int, int64_t, int64_t, int, uint8_t *, uint16_t *);
int KERNEL(interleave)(const uint8_t *, int64_t, int64_t, int, uint8_t *);

enum { BF16, F16, F32, GROUP = 32, TILE = 16, MAX_BLOCKS = 64 };
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

static void fuzz_half(void) {
    what = "half_product";
    const int64_t n = random_size(160), k = random_size(320), rows = random_count();
    const int kind = below(2) ? BF16 : F16;
    snprintf(shape, sizeof shape, "n %d, k %d, rows %d, kind %d", (int)n, (int)k, (int)rows, kind);
    int64_t bad;
    const float *x = random_rows(rows, k, &bad);
    const uint16_t *w = random_block(n * k, kind, random_scale(kind));
    float *y = block(rows * n, 4), *alone = block(n, 4);
    check(KERNEL(half_product)(w, kind == BF16, n, k, x, rows, y) == 0, "no memory");
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < k; j++) {
                float value = x[m * k + j], weight = get(w, kind, i * k + j);
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
            const float got = y[m * n + i];
            if (m == bad) check(!isfinite(got), "a NaN or an infinity was lost");
            else check(fabs(got - sum) <= 5e-6 * size + 1e-36, "a wrong sum");
        }
        check(KERNEL(half_product)(w, kind == BF16, n, k, x + m * k, 1, alone) == 0, "no memory");
        if (m != bad) check(!memcmp(alone, y + m * n, (size_t)n * 4), "a row depends on others");
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

static void fuzz_quantized(void) {
    what = "quantized_product";
    const int64_t n = random_size(below(8) ? 70 : 300), k = random_size(320), rows = random_count();
    const int kind = (int)below(3), bits = below(2) ? 8 : 4, has_zero = (int)below(2);
    const int64_t n_groups = (k + GROUP - 1) / GROUP, n_tiles = (n + TILE - 1) / TILE;
    const int64_t row_bytes = n_groups * GROUP * bits / 8;
    snprintf(
        shape, sizeof shape, "n %d, k %d, rows %d, kind %d, bits %d, zeros %d", (int)n, (int)k,
        (int)rows, kind, bits, has_zero);
    int64_t bad;
    const float *x = random_rows(rows, k, &bad);
    uint8_t *packed = block(n * row_bytes, 1), *zero = block(n * n_groups, 1);
    for (int64_t i = 0; i < n * row_bytes; i++) packed[i] = (uint8_t)next();
    for (int64_t i = 0; i < n * n_groups; i++) zero[i] = (uint8_t)below(1 << bits);
    const void *scale = random_block(n * n_groups, kind, random_scale(F16));
    /* the last tile's padding isn't read by the reference, but by the kernel */
    uint8_t *packed_tiles = block(n_tiles * TILE * row_bytes / 4, 4);
    uint8_t *zero_tiles = block(n_tiles * TILE * n_groups, 1);
    uint8_t *scale_tiles = block(n_tiles * TILE * n_groups, SIZES[kind]);
    KERNEL(interleave)(packed, n, row_bytes / 4, 4, packed_tiles);
    KERNEL(interleave)(zero, n, n_groups, 1, zero_tiles);
    KERNEL(interleave)(scale, n, n_groups, SIZES[kind], scale_tiles);
    float *y = block(rows * n, 4), *alone = block(n, 4);
    const uint8_t *zeros = has_zero ? zero_tiles : NULL;
    int result = KERNEL(quantized_product)(
        packed_tiles, scale_tiles, kind, zeros, bits, n, k, x, rows, y);
    check(result == 0, "no memory");
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t i = 0; i < n; i++) {
            float expected = 0;
            for (int64_t g = 0; g < n_groups; g++) {
                int32_t q[GROUP], sum = 0;
                const int64_t left = k - g * GROUP, at = i * n_groups + g;
                const float x_scale =
                    round_group(x + m * k + g * GROUP, left < GROUP ? left : GROUP, q);
                const int32_t middle = has_zero ? zero[at] : 1 << (bits - 1);
                for (int j = 0; j < GROUP; j++) {
                    const uint8_t byte = packed[i * row_bytes + (g * GROUP + j) * bits / 8];
                    const int32_t w = bits == 8 ? byte : j % 2 ? byte >> 4 : byte & 15;
                    sum += (w - middle) * q[j];
                }
                expected = fmaf((float)sum, get(scale, kind, at) * x_scale, expected);
            }
            const float got = y[m * n + i];
            if (m == bad) check(isnan(got) && isnan(expected), "a NaN or an infinity was lost");
            else check(got == expected, "a wrong sum");
        }
        result = KERNEL(quantized_product)(
            packed_tiles, scale_tiles, kind, zeros, bits, n, k, x + m * k, 1, alone);
        check(result == 0, "no memory");
        if (m == bad) continue; /* processors have different NaNs */
        check(!memcmp(alone, y + m * n, (size_t)n * 4), "a row depends on others");
        count(y + m * n, n * 4);
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

int main(int argc, char **argv) {
    check(argc == 3, "usage: check_kernels SEED N");
    void (*const functions[])(void) = {
        fuzz_half, fuzz_quantized, fuzz_quantize, fuzz_interleave, fuzz_attention};
    for (int f = 0; f < 5; f++)
        for (int i = 0; i < atoi(argv[2]); i++) {
            state = (uint64_t)(atoll(argv[1]) * 1000003 + f * 8191 + i + 1) * 0x9e3779b97f4a7c15u;
            functions[f]();
            free_blocks();
        }
    printf("%016llx\n", (unsigned long long)checksum);
    return 0;
}
