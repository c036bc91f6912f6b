/* Runs every kernel of an instruction set on random shapes, with buffers of exactly the needed size
   at odd addresses, and compares with plain loops. Prints a checksum of the integer products, which
   is the same for all instruction sets. Built by test_kernels.py, once with the address sanitizer.

   Usage: check_kernels [number of shapes] */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PASTE(a, b) a##_##b
#define JOIN(a, b) PASTE(a, b)
#define KERNEL(name) JOIN(name, ISA)

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

static uint64_t state = 1;
static uint32_t draw(uint32_t limit) { /* a linear congruential generator: the same everywhere */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % limit;
}
static float number(void) { return ((int32_t)draw(2001) - 1000) / 256.f; }

static float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Exactly ``bytes`` bytes up to the end of an allocation, aligned to ``align`` only. Never freed. */
static void *temporary(size_t bytes, size_t align) {
    const size_t offset = align * (1 + 2 * draw(3));
    char *start = malloc(bytes + offset);
    if (!start) exit(3);
    return start + offset;
}

static void fail(const char *what, int64_t n, int64_t k, int64_t rows, double got, double wanted) {
    printf("%s of %d x %d, %d rows: %g, expected %g\n", what, (int)n, (int)k, (int)rows, got, wanted);
    exit(1);
}
static int differs(double got, double wanted, double scale, double limit) {
    return !(fabs(got - wanted) <= limit * scale + 1e-6);
}

static void check_half(int64_t n, int64_t k, int64_t rows) {
    uint16_t *w = temporary(n * k * 2, 2);
    float *x = temporary(rows * k * 4, 4), *y = temporary(rows * n * 4, 4);
    for (int64_t i = 0; i < n * k; i++) {
        float f = number();
        uint32_t bits;
        memcpy(&bits, &f, 4);
        w[i] = bits >> 16;
    }
    for (int64_t i = 0; i < rows * k; i++) x[i] = from_bf16((uint16_t)(0x3f00 + draw(256)));
    if (KERNEL(half_product)(w, 1, n, k, x, rows, y)) exit(3);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < k; j++) {
                sum += (double)from_bf16(w[i * k + j]) * x[m * k + j];
                size += fabs((double)from_bf16(w[i * k + j]) * x[m * k + j]);
            }
            if (differs(y[m * n + i], sum, size, 1e-5)) fail("half", n, k, rows, y[m * n + i], sum);
        }
    for (int64_t i = 0; i < n * k; i++) w[i] = 0x3c00; /* 1 in float16 */
    if (KERNEL(half_product)(w, 0, n, k, x, rows, y)) exit(3);
    for (int64_t m = 0; m < rows; m++) {
        double sum = 0;
        for (int64_t j = 0; j < k; j++) sum += x[m * k + j];
        if (differs(y[m * n + n - 1], sum, sum, 1e-5)) fail("f16", n, k, rows, y[m * n], sum);
    }
}

static uint64_t check_quantized(int64_t n, int64_t k, int64_t rows, int bits) {
    const int64_t groups = (k + 31) / 32, tiles = (n + 15) / 16, bytes = groups * 4 * bits;
    float *w = temporary(n * k * 4, 4), *x = temporary(rows * k * 4, 4);
    float *y = temporary(rows * n * 4, 4);
    uint8_t *packed = temporary(n * bytes, 1), *tiled = temporary(tiles * 16 * bytes, 1);
    uint16_t *scale = temporary(n * groups * 2, 2), *scales = temporary(tiles * 16 * groups * 2, 2);
    uint8_t *zero = draw(2) ? temporary(n * groups, 1) : NULL, *zeros = NULL;
    for (int64_t i = 0; i < n * k; i++) w[i] = number();
    for (int64_t i = 0; i < rows * k; i++) x[i] = number();
    if (KERNEL(quantize)(w, 2, n, k, bits, packed, scale)) exit(3);
    if (KERNEL(interleave)(packed, n, bytes / 4, 4, tiled)) exit(3);
    if (KERNEL(interleave)((uint8_t *)scale, n, groups, 2, (uint8_t *)scales)) exit(3);
    if (zero) {
        zeros = temporary(tiles * 16 * groups, 1);
        for (int64_t i = 0; i < n * groups; i++) zero[i] = draw(1 << bits);
        if (KERNEL(interleave)(zero, n, groups, 1, zeros)) exit(3);
    }
    if (KERNEL(quantized_product)(tiled, scales, 0, zeros, bits, n, k, x, rows, y)) exit(3);
    uint64_t sum = 0;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = 0; i < n; i++) {
            double total = 0, size = 0;
            for (int64_t j = 0; j < k; j++) {
                const uint8_t *row = packed + i * bytes;
                int q = bits == 8 ? row[j] : j % 2 ? row[j / 2] >> 4 : row[j / 2] & 15;
                int z = zero ? zero[i * groups + j / 32] : 1 << (bits - 1);
                float s = from_bf16(scale[i * groups + j / 32]);
                if (!zero && fabs((q - z) * s - w[i * k + j]) > 2.1 * fabs(s)) /* the largest may be clipped */
                    fail("weight", n, k, bits, (q - z) * s, w[i * k + j]);
                total += (q - z) * (double)s * x[m * k + j];
                size += fabs((q - z) * (double)s) * 4; /* |x| < 4 is rounded to 1 / 127 */
            }
            if (differs(y[m * n + i], total, size, 1 / 127.))
                fail("quantized", n, k, rows, y[m * n + i], total);
            uint32_t word;
            memcpy(&word, y + m * n + i, 4);
            sum = sum * 31 + word;
        }
    return sum;
}

static void check_attention(int64_t rows, int64_t heads, int64_t queries, int64_t length) {
    const int64_t dim = 16 * (1 + draw(4)), n = rows * heads * queries * dim;
    const int64_t size = rows * heads * length * dim;
    float *q = temporary(n * 4, 4), *y = temporary(n * 4, 4);
    uint16_t *k = temporary(size * 2, 2), *v = temporary(size * 2, 2);
    int32_t *lengths = temporary(rows * 4, 4);
    for (int64_t i = 0; i < n; i++) q[i] = number();
    for (int64_t i = 0; i < size; i++) k[i] = 0x3f00 + draw(256), v[i] = 0x3f00 + draw(256);
    for (int64_t b = 0; b < rows; b++) lengths[b] = 1 + draw(length);
    if (KERNEL(decode_attention)(q, k, v, 0, lengths, rows, heads, queries, length, dim, y)) exit(3);
    for (int64_t i = 0; i < rows * heads * queries; i++) {
        const int64_t head = i / queries, used = lengths[head / heads];
        double total = 0, sum = 0, most = -INFINITY, score[64];
        for (int64_t t = 0; t < used; t++) {
            score[t] = 0;
            for (int64_t d = 0; d < dim; d++)
                score[t] += q[i * dim + d] * from_bf16(k[(head * length + t) * dim + d]);
            score[t] /= sqrt(dim);
            most = score[t] > most ? score[t] : most;
        }
        for (int64_t t = 0; t < used; t++) {
            total += exp(score[t] - most);
            sum += exp(score[t] - most) * from_bf16(v[(head * length + t) * dim]);
        }
        if (differs(y[i * dim], sum / total, 1, 1e-4)) fail("attention", heads, dim, rows, y[i * dim], sum / total);
    }
}

int main(int argc, char **argv) {
    const int n_shapes = argc > 1 ? atoi(argv[1]) : 100;
    uint64_t sum = 0;
    for (int i = 0; i < n_shapes; i++) {
        const int64_t n = 1 + draw(70), k = 1 + draw(300), rows = draw(20);
        check_half(n, k, rows);
        sum = sum * 31 + check_quantized(n, k, rows, 8);
        sum = sum * 31 + check_quantized(n, k, rows, 4);
        const int64_t heads = 1 + draw(3), queries = 1 + draw(8), length = 1 + draw(64);
        check_attention(1 + rows % 3, heads, queries, length);
    }
    printf("%016llx\n", (unsigned long long)sum);
    return 0;
}
