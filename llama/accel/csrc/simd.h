/* The vector operations that the kernels are written in, for AVX512, AVX2 and NEON.

   vf is a vector of LANES floats, vi of LANES int32. Every operation is rounded as the scalar one
   (a fused multiply-add once), so that all architectures give the same bits where the order of the
   operations is the same. f_min(a, b) and f_max(a, b) are NaN if b is. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

#define INLINE static inline __attribute__((always_inline))
/* compilers give up on nests of more than 16 bodies, and keep their variables in memory then */
#define UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX2__)
#include <immintrin.h>
/* Each vector's sum. */
INLINE void store_sums(__m256 a, __m256 b, __m256 c, __m256 d, float *sums) {
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
#endif

#if defined(__AVX512F__)

#define LANES 16
typedef __m512 vf;
typedef __m512i vi;
INLINE vf f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void f_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf f_set1(float a) { return _mm512_set1_ps(a); }
INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf f_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE float f_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE __m256 f_halves(vf a) {
    const __m512d b = _mm512_castps_pd(a);
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(b, 1)));
}
INLINE void f_sum_4(const vf *a, float *sums) {
    store_sums(f_halves(a[0]), f_halves(a[1]), f_halves(a[2]), f_halves(a[3]), sums);
}
INLINE vf f_from_bf16(const uint16_t *p) {
    vi wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf f_from_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
INLINE void f_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf f_power_of_two(vf n) {
    vi exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
INLINE vf f_from_i(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi i_set1(int32_t a) { return _mm512_set1_epi32(a); }
INLINE vi i_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vi i_load_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
}
INLINE vi i_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vi i_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
INLINE vi i_low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vi i_high_nibbles(vi a) { return i_low_nibbles(_mm512_srli_epi16(a, 4)); }

#elif defined(__AVX2__)

#define LANES 8
typedef __m256 vf;
typedef __m256i vi;
INLINE vf f_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void f_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf f_set1(float a) { return _mm256_set1_ps(a); }
INLINE vf f_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf f_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf f_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf f_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE float f_sum(vf a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
INLINE void f_sum_4(const vf *a, float *sums) { store_sums(a[0], a[1], a[2], a[3], sums); }
INLINE vf f_from_bf16(const uint16_t *p) {
    vi wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf f_from_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}
INLINE void f_store_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf f_power_of_two(vf n) {
    vi exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE vf f_from_i(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vi i_set1(int32_t a) { return _mm256_set1_epi32(a); }
INLINE vi i_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE vi i_load_u8(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
}
INLINE vi i_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE vi i_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
INLINE vi i_low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE vi i_high_nibbles(vi a) { return i_low_nibbles(_mm256_srli_epi16(a, 4)); }

#elif defined(__ARM_NEON)

#include <arm_neon.h>
#define LANES 4
typedef float32x4_t vf;
typedef int32x4_t vi;
INLINE vf f_load(const float *p) { return vld1q_f32(p); }
INLINE void f_store(float *p, vf a) { vst1q_f32(p, a); }
INLINE vf f_set1(float a) { return vdupq_n_f32(a); }
INLINE vf f_add(vf a, vf b) { return vaddq_f32(a, b); }
INLINE vf f_mul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf f_div(vf a, vf b) { return vdivq_f32(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf f_min(vf a, vf b) { return vminq_f32(a, b); }
INLINE vf f_max(vf a, vf b) { return vmaxq_f32(a, b); }
INLINE vf f_round(vf a) { return vrndnq_f32(a); }
INLINE float f_sum(vf a) { return vaddvq_f32(a); }
INLINE void f_sum_4(const vf *a, float *sums) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}
INLINE vf f_from_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
INLINE vf f_from_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void f_store_f16(uint16_t *p, vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
INLINE vf f_power_of_two(vf n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
INLINE vf f_from_i(vi a) { return vcvtq_f32_s32(a); }
INLINE vi i_set1(int32_t a) { return vdupq_n_s32(a); }
INLINE vi i_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
INLINE vi i_load_u8(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
INLINE vi i_sub(vi a, vi b) { return vsubq_s32(a, b); }
INLINE vi i_mul(vi a, vi b) { return vmulq_s32(a, b); }
INLINE vi i_low_nibbles(vi a) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(15)));
}
INLINE vi i_high_nibbles(vi a) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 4));
}

#endif

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64; /* NaN */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;              /* nearest, ties to even */
}

/* LANES numbers of a kind, from item ``at`` on. */
INLINE vf f_load_kind(const void *p, int kind, int64_t at) {
    switch (kind) {
    case BF16: return f_from_bf16((const uint16_t *)p + at);
    case F16: return f_from_f16((const uint16_t *)p + at);
    default: return f_load((const float *)p + at);
    }
}

INLINE void f_store_kind(void *p, int kind, int64_t at, vf a) {
    switch (kind) {
    case BF16: {
        float lanes[LANES];
        f_store(lanes, a);
        for (int i = 0; i < LANES; i++) ((uint16_t *)p)[at + i] = float_to_bf16(lanes[i]);
        break;
    }
    case F16: f_store_f16((uint16_t *)p + at, a); break;
    default: f_store((float *)p + at, a);
    }
}

INLINE float f_largest(vf a) {
    float lanes[LANES];
    f_store(lanes, a);
    for (int i = 1; i < LANES; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

/* The first row of chunk c of ``n`` chunks of nearly equal size. */
INLINE int64_t chunk_start(int64_t c, int64_t n, int64_t rows) { return c * rows / n; }

/* e^x = 2^n 2^r with |r| <= 1/2, and the Taylor series of 2^r = e^(r ln 2) to the 7th power, whose
   error is below float32's. e^-87, about 1e-38, below -87. */
INLINE vf f_exp(vf x) {
    const vf y = f_mul(f_max(f_set1(-87), x), f_set1(1.44269504f));
    const vf n = f_round(y), r = f_mul(f_fma(f_set1(-1), n, y), f_set1(0.693147181f));
    vf sum = f_set1(1.f / 5040);
    const float divisors[] = {720, 120, 24, 6, 2, 1, 1};
    for (int i = 0; i < 7; i++) sum = f_fma(sum, r, f_set1(1 / divisors[i]));
    return f_mul(sum, f_power_of_two(n));
}
