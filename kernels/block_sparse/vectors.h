/* Vectors of floats with the compiler's extensions, and numbers of 16 bits. */

#pragma once

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#endif

#define VL (VECTOR_BYTES / 4)            /* floats in a vector */
#define NV (VECTOR_BYTES == 32 ? 2 : 4)  /* vectors side by side: AVX2 has half the registers */
#define LANES (NV * VL)                  /* query rows that are computed together, at most 64 */
#define MR 6                             /* keys or channels per tile: MR * NV accumulators */
#define KEYS 64                          /* keys between two visits to the output */
#define LAZY 8.0f
#define LOG2E 1.44269504088896340736f
#define LN2 0.693147180559945309417f

#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef float vfu __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef int32_t viu __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef uint16_t vhu __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    float value;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else {
        /* 2^112 moves the exponent from half's bias to float's; it is exact for subnormals too */
        bits = rest << 13;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_half(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or beyond */
    if (bits < 0x38800000) {                                  /* subnormal: let the adder round */
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t)(sign | (bits - 0x38000000) >> 13);
}

INLINE float from_bfloat(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load_element(const void *base, int64_t index, int dtype) {
    if (dtype == FLOAT32) return ((const float *)base)[index];
    uint16_t h = ((const uint16_t *)base)[index];
    return dtype == BFLOAT16 ? from_bfloat(h) : from_half(h);
}

INLINE void store_element(void *base, int64_t index, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)base)[index] = value;
    else ((uint16_t *)base)[index] = dtype == BFLOAT16 ? to_bfloat(value) : to_half(value);
}

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splat_bits(uint32_t x) { return (int32_t)x - (vi){0}; }

/* The second operand wins where either is NaN. */
INLINE vf vmax(vf a, vf b) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VECTOR_BYTES == 32
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi greater = a > b;
    return (vf)((greater & (vi)a) | (~greater & (vi)b));
#endif
}

INLINE int any_lane(vi mask) {
#if VECTOR_BYTES == 64
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VECTOR_BYTES == 32
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

/* 2^t for t <= 127, 0 far below. Few terms are enough for weights in bfloat16. */
#if VECTOR_BYTES == 64 && defined(__AVX512DQ__)
INLINE vf vexp2(vf t, int few_terms) {
    vf f = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* t - floor(t) */
    vf p;
    if (few_terms) { /* relative error 8e-5 */
        p = splat(7.8024521470e-2f) * f + splat(2.2606715560e-1f);
        p = p * f + splat(6.9583356380e-1f);
        p = p * f + splat(9.9992519617e-1f);
    } else { /* relative error 8e-8 */
        p = splat(1.8671301659e-3f) * f + splat(9.0170297772e-3f);
        p = p * f + splat(5.5799912661e-2f);
        p = p * f + splat(2.4016444385e-1f);
        p = p * f + splat(6.9315129519e-1f);
        p = p * f + splat(1.0f);
    }
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);
}
#else
INLINE vf vexp2(vf t, int few_terms) {
    const vf magic = splat(0x1.8p23f + 127.0f); /* low bits of t + magic are the biased exponent */
    t = vmax(splat(-127.0f), t);
    vf shifted = t + magic;
    vf f = t - (shifted - magic);
    vf power = (vf)((vi)shifted << 23);
    vf p;
    if (few_terms) { /* relative error 8e-5 */
        p = splat(0.0551716695f) * f + splat(0.2426111254f);
        p = p * f + splat(0.6932609857f);
        p = p * f + splat(0.9999280733f);
    } else { /* relative error 8e-8 */
        p = splat(1.3276472048e-3f) * f + splat(9.6755413847e-3f);
        p = p * f + splat(5.5507132738e-2f);
        p = p * f + splat(2.4022119722e-1f);
        p = p * f + splat(6.9314696706e-1f);
        p = p * f + splat(1.0000000717f);
    }
    return p * power;
}
#endif

/* VL consecutive elements as floats. */
INLINE vf load_floats(const void *src, int64_t at, int dtype) {
    if (dtype == FLOAT32) return *(const vfu *)((const float *)src + at);
    const uint16_t *from = (const uint16_t *)src + at;
    if (dtype == BFLOAT16) return (vf)(__builtin_convertvector(*(const vhu *)from, vi) << 16);
#if VECTOR_BYTES == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif VECTOR_BYTES == 32 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    vf x;
    for (int i = 0; i < VL; i++) x[i] = from_half(from[i]);
    return x;
#endif
}

INLINE void store_floats(void *dst, int64_t at, vf x, int dtype) {
    if (dtype == FLOAT32) {
        *(vfu *)((float *)dst + at) = x;
        return;
    }
    uint16_t *to = (uint16_t *)dst + at;
#if HAS_DOT
    if (dtype == BFLOAT16) {
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
        return;
    }
#endif
#if VECTOR_BYTES == 64
    if (dtype == FLOAT16) {
        _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    for (int i = 0; i < VL; i++) to[i] = dtype == BFLOAT16 ? to_bfloat(x[i]) : to_half(x[i]);
}

#if HAS_DOT
static const uint16_t IN_TURN[] __attribute__((aligned(64))) = {
    0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* Weights of two keys, rounded to bfloat16, in the words of their rows. */
INLINE vf pair_weights(vf first, vf second) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), both);
}

INLINE vf first_of(vf pair) { return (vf)((vi)pair << 16); }
INLINE vf second_of(vf pair) { return (vf)((vi)pair & splat_bits(0xffff0000u)); }
#endif

/* Half of a butterfly: lanes `l` of the result come from lane FIRST or SECOND of the pair (a, b). */
#define FIRST(l, s) ((l) & (s) ? VL + (l) - (s) : (l))
#define SECOND(l, s) ((l) & (s) ? VL + (l) : (l) + (s))
#if VECTOR_BYTES == 64
#define EACH_LANE(f, s)                                                                            \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s),      \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif VECTOR_BYTES == 32
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define EACH_LANE(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, EACH_LANE(f, s))
#else
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (vi){EACH_LANE(f, s)})
#endif
#define BUTTERFLY(x, s)                                                                            \
    UNROLL for (int i = 0; i < VL; i++)                                                                   \
        if (!(i & (s))) {                                                                          \
            vf low = SHUFFLE(x[i], x[i + (s)], FIRST, s), high = SHUFFLE(x[i], x[i + (s)], SECOND, s); \
            x[i] = low;                                                                            \
            x[i + (s)] = high;                                                                     \
        }

INLINE void transpose(vf x[VL]) {
    BUTTERFLY(x, 1)
    BUTTERFLY(x, 2)
#if VECTOR_BYTES >= 32
    BUTTERFLY(x, 4)
#endif
#if VECTOR_BYTES >= 64
    BUTTERFLY(x, 8)
#endif
}

/* Large buffers come in large pages where the system has them: fewer faults, fewer misses. */
static void *allocate(size_t bytes) {
    const size_t huge = (size_t)2 << 20;
    void *memory = NULL;
    if (posix_memalign(&memory, bytes >= huge ? huge : 64, bytes)) return NULL;
#ifdef MADV_HUGEPAGE
    if (bytes >= huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

INLINE size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }
