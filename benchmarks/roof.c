/* How fast this core's multipliers are: chains of multiply-adds, and nothing else. */

#include "../kernels/block_sparse/vectors.h"

#define CHAINS 12 /* more than latency times units; fewer than the registers of AVX2 */

static volatile float sink;
static volatile float near_one = 0.9999f;

/* Floating-point operations done. */
int64_t roof_float32(int64_t rounds) {
    vf acc[CHAINS], factor = splat(near_one), term = splat(1 - near_one);
    UNROLL
    for (int i = 0; i < CHAINS; i++) acc[i] = splat(near_one + (float)i);
    for (int64_t n = 0; n < rounds; n++)
        UNROLL
        for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * factor + term;
    for (int i = 0; i < CHAINS; i++) sink = acc[i][i % VL];
    return rounds * CHAINS * VL * 2;
}

/* The same with dot products of bfloat16 pairs; 0 where the processor has none. */
int64_t roof_bfloat16(int64_t rounds) {
#if HAS_DOT
    vf acc[CHAINS];
    __m512bh pairs = (__m512bh)_mm512_set1_epi32(0x3c003c00), other = pairs; /* 2^-7 */
    __asm__ volatile("" : "+v"(pairs), "+v"(other));
    UNROLL
    for (int i = 0; i < CHAINS; i++) acc[i] = splat((float)i);
    for (int64_t n = 0; n < rounds; n++)
        UNROLL
        for (int i = 0; i < CHAINS; i++)
            acc[i] = (vf)_mm512_dpbf16_ps((__m512)acc[i], pairs, other);
    for (int i = 0; i < CHAINS; i++) sink = acc[i][i % VL];
    return rounds * CHAINS * VL * 4;
#else
    (void)rounds;
    return 0;
#endif
}
