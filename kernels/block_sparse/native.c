/* Block-sparse attention on a CPU: one source for AVX-512, AVX2, NEON and anything else.
 *
 * Plain C ABI, no headers of PyTorch, so that a system compiler builds it in about a second. Keys and
 * values of one head are packed into panels of VL keys (VL lanes of a vector register); a query tile
 * of up to MR rows then runs over groups of panels: scores of NV panels in registers, weights without
 * a second pass over the scores, weights times values in registers again.
 *
 * The running maximum of a row is raised only when a score exceeds it by 2^LAZY; until then weights
 * above 1 are harmless, and the output needs no rescaling.
 */

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

#define VL (VECTOR_BYTES / 4)            /* keys per panel */
#define NV (VECTOR_BYTES == 32 ? 2 : 4)  /* panels per strip: AVX2 has half the registers */
#define MR 6                             /* query rows per tile: MR * NV accumulators */
#define GROUP 256                        /* keys between two visits to the output */
#define GROUP_PANELS (GROUP / VL)
#define MAX_ROWS 192 /* query rows per work item, a multiple of MR */
#define PACK_KEYS 256
#define LAZY 8.0f
#define ALL_LANES ((1u << VL) - 1)
/* weights of a row, in floats: bfloat16 ones take half */
#define WEIGHTS_ROW(dot) ((dot) ? GROUP / 2 : GROUP)
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
typedef uint16_t vhu __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

/* Mirrored by ctypes in native.py; strides count elements. */
typedef struct {
    const void *query, *key, *value;
    void *out;
    float *lse; /* [B, H, S_q] contiguous, or NULL */
    int64_t batch, heads, kv_heads, len_q, len_k, dim, dim_v;
    int64_t q_stride[4], k_stride[4], v_stride[4], o_stride[4];
    int64_t block_q, block_k;
    const uint8_t *block_mask; /* [B', H', n_q, n_k], or NULL where lists are given */
    const int32_t *indices, *counts, *mask_ids;
    const uint64_t *mask_bits; /* [n_masks, block_q, mask_words] */
    int64_t list_stride[3];    /* rows of block_mask or indices per batch, head and query block */
    int64_t list_width, num_masks, mask_words;
    const void *attn_mask;
    int64_t m_stride[4];
    int32_t dtype, attn_mask_kind, is_causal, threads;
    float scale;
} Call;

typedef struct {
    int32_t panel, key, block; /* panel of the head, its first key, position of its list entry */
    uint32_t bits;             /* lanes that hold a key that every row may see */
} PanelRef;

/* What one thread works in. */
typedef struct {
    char *base;
    float *q, *out, *weights, *sums, *maxima, *limits, *bias;
    PanelRef *panels;
    const uint64_t **entry_bits;
} Scratch;

typedef struct {
    const Call *call;
    int use_dot;
    int64_t num_q, num_k, panels_per_block, num_panels, chunks_per_block, rows_per_item;
    int64_t groups, pack_items, attend_items, items;
    int64_t k_panel_bytes, v_panel_bytes, slot_bytes, vectors_v, depth;
    int slots;
    char *packed;
    float sign, factor; /* sign of the scale, and |scale| * log2(e) */
    _Atomic int64_t next;
    _Atomic int invalid; /* a list names a block or mask that does not exist */
    _Atomic int64_t *packs_done, *attends_done;
} Job;

/* ---- numbers ---------------------------------------------------------------------------------- */

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

INLINE int64_t size_of(const Call *c) { return c->dtype == FLOAT32 ? 4 : 2; }

INLINE vf splat(float x) { return x - (vf){0}; }

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

/* 2^t for t <= 127; exactly 0 below -127. Few terms are enough for weights in bfloat16. */
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

/* ---- packing ---------------------------------------------------------------------------------- */

/* Half of a butterfly: lanes `l` of the result come from lane FIRST or SECOND of the pair (a, b). */
#define FIRST(l, s) ((l) & (s) ? VL + (l) - (s) : (l))
#define SECOND(l, s) ((l) & (s) ? VL + (l) : (l) + (s))
#if VECTOR_BYTES == 64
#define LANES(f, s)                                                                                \
    f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s),      \
        f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif VECTOR_BYTES == 32
#define LANES(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define LANES(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, LANES(f, s))
#else
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (vi){LANES(f, s)})
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

/* The 32 bits of a packed key: a float, or two consecutive bfloat16 elements for dot products. */
INLINE uint32_t load_word(const Job *job, const void *src, int64_t row, int64_t d) {
    const Call *c = job->call;
    const uint16_t *from = (const uint16_t *)src + row * c->k_stride[2];
    int64_t step = c->k_stride[3];
    if (job->use_dot) {
        uint32_t high = 2 * d + 1 < c->dim ? from[(2 * d + 1) * step] : 0;
        return from[2 * d * step] | high << 16;
    }
    float value = load_element(src, row * c->k_stride[2] + d * step, c->dtype);
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

/* Keys become columns: word dst[d * VL + j], zero from `rows` on. */
INLINE void pack_key_panel(const Job *job, const void *src, int64_t rows, void *dst,
                           const int dtype, const int dot) {
    const Call *c = job->call;
    uint32_t *to = dst;
    int64_t d = 0, row = c->k_stride[2];
    /* whole words only: an odd last element has no partner */
    int64_t whole = c->k_stride[3] != 1 ? 0 : dot ? c->dim / 2 : c->dim;
    for (; d + VL <= whole; d += VL) {
        vf x[VL];
        UNROLL
        for (int j = 0; j < VL; j++) {
            x[j] = (vf){0};
            if (j >= rows) continue;
            if (dot) x[j] = *(const vfu *)((const uint16_t *)src + j * row + 2 * d);
            else x[j] = load_floats(src, j * row + d, dtype);
        }
        transpose(x);
        UNROLL
        for (int j = 0; j < VL; j++) *(vf *)(to + (d + j) * VL) = x[j];
    }
    for (; d < job->depth; d++)
        for (int64_t j = 0; j < VL; j++)
            to[d * VL + j] = j < rows ? load_word(job, src, j, d) : 0;
}

/* Keys stay rows: word dst[j * width + d]; for dot products two keys share a word. */
INLINE void pack_value_panel(const Job *job, const void *src, int64_t rows, void *dst,
                             const int dtype, const int dot) {
    const Call *c = job->call;
    int64_t row = c->v_stride[2], step = c->v_stride[3], width = job->vectors_v * VL;
    if (dot) {
        uint32_t *to = dst;
        const uint16_t *from = src;
        for (int64_t j = 0; j < VL; j += 2, to += width) {
            const uint16_t *a = from + j * row, *b = a + row;
            int64_t first = j < rows ? c->dim_v : 0, second = j + 1 < rows ? c->dim_v : 0, d = 0;
            if (step == 1)
                for (; d + VL <= second; d += VL)
                    *(vi *)(to + d) = __builtin_convertvector(*(const vhu *)(a + d), vi) |
                                      __builtin_convertvector(*(const vhu *)(b + d), vi) << 16;
            for (; d < width; d++)
                to[d] = (d < first ? a[d * step] : 0u) |
                        (uint32_t)(d < second ? b[d * step] : 0) << 16;
        }
        return;
    }
    float *to = dst;
    for (int64_t j = 0; j < VL; j++, to += width) {
        int64_t d = 0, dims = j < rows ? c->dim_v : 0;
        if (step == 1)
            for (; d + VL <= dims; d += VL) *(vf *)(to + d) = load_floats(src, j * row + d, dtype);
        for (; d < width; d++)
            to[d] = d < dims ? load_element(src, j * row + d * step, dtype) : 0;
    }
}

NOINLINE void pack_panel(const Job *job, const void *k, const void *v, int64_t rows, void *to_k,
                         void *to_v) {
    int dtype = job->call->dtype;
    if (job->use_dot) {
        pack_key_panel(job, k, rows, to_k, BFLOAT16, 1);
        pack_value_panel(job, v, rows, to_v, BFLOAT16, 1);
    } else if (dtype == FLOAT32) {
        pack_key_panel(job, k, rows, to_k, FLOAT32, 0);
        pack_value_panel(job, v, rows, to_v, FLOAT32, 0);
    } else {
        pack_key_panel(job, k, rows, to_k, dtype, 0);
        pack_value_panel(job, v, rows, to_v, dtype, 0);
    }
}

static char *slot_of(const Job *job, int64_t group) {
    return job->packed + group % job->slots * job->slot_bytes;
}

static void pack_item(const Job *job, int64_t group, int64_t item) {
    const Call *c = job->call;
    int64_t size = size_of(c), b = group / c->kv_heads, h = group % c->kv_heads;
    const char *k = (const char *)c->key + (b * c->k_stride[0] + h * c->k_stride[1]) * size;
    const char *v = (const char *)c->value + (b * c->v_stride[0] + h * c->v_stride[1]) * size;
    char *slot = slot_of(job, group);
    int64_t first = item * PACK_KEYS / VL, last = first + PACK_KEYS / VL;
    if (last > job->num_panels) last = job->num_panels;
    for (int64_t panel = first; panel < last; panel++) {
        int64_t block = panel / job->panels_per_block, inside = panel % job->panels_per_block * VL;
        int64_t start = block * c->block_k + inside, rows = c->block_k - inside;
        if (rows > c->len_k - start) rows = c->len_k - start;
        if (rows > VL) rows = VL;
        if (rows <= 0) continue;
        pack_panel(job, k + start * c->k_stride[2] * size, v + start * c->v_stride[2] * size, rows,
                   slot + panel * job->k_panel_bytes,
                   slot + job->num_panels * job->k_panel_bytes + panel * job->v_panel_bytes);
    }
}

/* ---- one tile of query rows ------------------------------------------------------------------- */

typedef struct {
    const Job *job;
    const char *keys, *values; /* panels of the head */
    Scratch *s;
    const float *q; /* of this tile */
    float *out, *sums, *maxima, *limits;
    int64_t row;     /* first query row */
    int rows;        /* at most MR */
    int64_t b, h, first_row; /* first_row: of the query block */
    /* panels whose weights wait to be multiplied with their values */
    int pending;
    int32_t waiting[GROUP_PANELS];
} Tile;

INLINE void add_values(Tile *t, int first, const int rows, const int width, int64_t column,
                       const int dot) {
    const Job *job = t->job;
    int64_t stride = job->vectors_v * VL;
    float *out = t->out + first * stride + column;
    const float *weights = t->s->weights + first * WEIGHTS_ROW(dot);
    vf acc[MR][NV];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < width; v++)
            acc[r][v] = *(const vf *)(out + r * stride + v * VL);
    for (int n = 0; n < t->pending; n++) {
        const char *panel = t->values + t->waiting[n] * job->v_panel_bytes + column * 4;
        if (dot) {
#if HAS_DOT
            const uint32_t *p = (const uint32_t *)weights + n * (VL / 2);
            for (int k = 0; k < VL / 2; k++) {
                __m512bh val[NV];
                UNROLL
                for (int v = 0; v < width; v++)
                    val[v] = (__m512bh)_mm512_load_si512(panel + (k * stride + v * VL) * 4);
                UNROLL
                for (int r = 0; r < rows; r++) {
                    __m512bh w = (__m512bh)_mm512_set1_epi32((int)p[r * (GROUP / 2) + k]);
                    UNROLL
                    for (int v = 0; v < width; v++)
                        acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], w, val[v]);
                }
            }
#endif
        } else {
            const float *p = weights + n * VL;
            for (int k = 0; k < VL; k++) {
                vf val[NV];
                UNROLL
                for (int v = 0; v < width; v++)
                    val[v] = *(const vf *)(panel + (k * stride + v * VL) * 4);
                UNROLL
                for (int r = 0; r < rows; r++) {
                    vf w = splat(p[r * GROUP + k]);
                    UNROLL
                    for (int v = 0; v < width; v++) acc[r][v] += w * val[v];
                }
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < width; v++)
            *(vf *)(out + r * stride + v * VL) = acc[r][v];
}

INLINE void add_all_values(Tile *t, int first, const int rows, const int dot) {
    int64_t left = t->job->vectors_v, column = 0;
    while (left > 0) {
        /* even widths: 5 vectors as 3 + 2, not 4 + 1 */
        int64_t tiles = (left + NV - 1) / NV, width = (left + tiles - 1) / tiles;
        switch (width) {
        case 1: add_values(t, first, rows, 1, column, dot); break;
        case 2: add_values(t, first, rows, 2, column, dot); break;
        case 3: add_values(t, first, rows, 3, column, dot); break;
        default: add_values(t, first, rows, NV, column, dot); break;
        }
        left -= width;
        column += width * VL;
    }
}

/* Four to MR rows at once; fewer one by one, so that no row beyond the tile is touched. */
#define FOR_ROWS(t, name, ...)                                                                     \
    if ((t)->rows == MR) name(__VA_ARGS__, 0, MR, DOT);                                            \
    else if ((t)->rows == 5) name(__VA_ARGS__, 0, 5, DOT);                                         \
    else if ((t)->rows == 4) name(__VA_ARGS__, 0, 4, DOT);                                         \
    else                                                                                           \
        for (int first = 0; first < (t)->rows; first++) name(__VA_ARGS__, first, 1, DOT);

#define DOT 0
NOINLINE void flush_float(Tile *t) { FOR_ROWS(t, add_all_values, t) }
#undef DOT

#if HAS_DOT
#define DOT 1
NOINLINE void flush_dot(Tile *t) { FOR_ROWS(t, add_all_values, t) }
#undef DOT
#endif

INLINE void flush(Tile *t, const int dot) {
    if (!t->pending) return;
#if HAS_DOT
    if (dot) flush_dot(t);
    else flush_float(t);
#else
    (void)dot;
    flush_float(t);
#endif
    t->pending = 0;
}

/* Raise the maxima of rows with a score above their limit; what they summed before shrinks, and so
 * do the weights that wait for their values. */
NOINLINE void raise_maxima(Tile *t, const vf *scores, float factor, int first, int rows,
                           const int dot) {
    int64_t stride = t->job->vectors_v * VL;
    for (int r = first; r < first + rows; r++, scores += NV) {
        vf best = vmax(scores[0], scores[1]);
        for (int v = 2; v < NV; v++) best = vmax(best, scores[v]);
        float top = best[0];
        for (int i = 1; i < VL; i++) top = best[i] > top ? best[i] : top;
        if (!(top > t->limits[r])) continue;
        float maximum = top * factor;
        float shrink = t->maxima[r] > -FLT_MAX ? exp2f(t->maxima[r] - maximum) : 0; /* else slow */
        t->maxima[r] = maximum;
        t->limits[r] = (maximum + LAZY) / factor;
        *(vf *)(t->sums + r * VL) *= splat(shrink);
        for (int64_t d = 0; d < stride; d += VL) *(vf *)(t->out + r * stride + d) *= splat(shrink);
        float *weights = t->s->weights + r * WEIGHTS_ROW(dot);
        for (int i = 0; i < t->pending * VL; i++) {
            uint16_t *w = (uint16_t *)weights + i;
            if (dot) *w = to_bfloat(from_bfloat(*w) * shrink);
            else weights[i] *= shrink;
        }
    }
}

typedef struct {
    int count, masked, biased;
    int32_t panel[NV], key[NV];
    uint64_t visible[MR]; /* bit v * VL + i: lane i of panel v */
} Strip;

INLINE void attend_strip(Tile *t, const Strip *strip, int first, const int rows, const int dot) {
    const Job *job = t->job;
    float *sums = t->sums + first * VL, *weights = t->s->weights + first * WEIGHTS_ROW(dot);
    const float *maxima = t->maxima + first, *limits = t->limits + first;
    const float *queries = t->q + first * job->depth;
    const char *k0[NV];
    vf acc[MR][NV];
    UNROLL
    for (int v = 0; v < NV; v++) k0[v] = t->keys + strip->panel[v] * job->k_panel_bytes;
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < NV; v++) acc[r][v] = (vf){0};
    int64_t depth = job->depth;
    if (dot) {
#if HAS_DOT
        const uint32_t *q = (const uint32_t *)queries;
        for (int64_t d = 0; d < depth; d++) {
            __m512bh key[NV];
            UNROLL
            for (int v = 0; v < NV; v++)
                key[v] = (__m512bh)_mm512_load_si512(k0[v] + d * VECTOR_BYTES);
            UNROLL
            for (int r = 0; r < rows; r++) {
                __m512bh x = (__m512bh)_mm512_set1_epi32((int)q[r * depth + d]);
                UNROLL
                for (int v = 0; v < NV; v++)
                    acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], x, key[v]);
            }
        }
#endif
    } else {
        for (int64_t d = 0; d < depth; d++) {
            vf key[NV];
            UNROLL
            for (int v = 0; v < NV; v++) key[v] = *(const vf *)(k0[v] + d * VECTOR_BYTES);
            UNROLL
            for (int r = 0; r < rows; r++) {
                vf x = splat(queries[r * depth + d]);
                UNROLL
                for (int v = 0; v < NV; v++) acc[r][v] += x * key[v];
            }
        }
    }
    float factor = job->factor;
    if (strip->biased) {
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++)
                acc[r][v] = acc[r][v] * splat(factor) +
                            *(const vf *)(t->s->bias + ((first + r) * NV + v) * VL);
        factor = 1.0f;
    }
    if (strip->masked) {
        vi lane;
        for (int i = 0; i < VL; i++) lane[i] = 1 << i;
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++) {
                vi word = (int32_t)(strip->visible[first + r] >> (v * VL) & ALL_LANES) - (vi){0};
                vi seen = (word & lane) != 0;
                acc[r][v] = (vf)((seen & (vi)acc[r][v]) | (~seen & (vi)splat(-INFINITY)));
            }
    }
    vi over = {0};
    UNROLL
    for (int r = 0; r < rows; r++) {
        vf best = vmax(acc[r][0], acc[r][1]);
        for (int v = 2; v < NV; v++) best = vmax(best, acc[r][v]);
        over |= best > splat(limits[r]);
    }
    if (__builtin_expect(any_lane(over), 0)) {
        vf scores[MR * NV];
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NV; v++) scores[r * NV + v] = acc[r][v];
        raise_maxima(t, scores, factor, first, rows, dot);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        vf top = splat(maxima[r]), sum = *(vf *)(sums + r * VL);
        vf p[NV];
        UNROLL
        for (int v = 0; v < NV; v++) {
            p[v] = vexp2(acc[r][v] * splat(factor) - top, dot);
            sum += p[v];
        }
        *(vf *)(sums + r * VL) = sum;
        if (dot) {
#if HAS_DOT
            uint16_t *to = (uint16_t *)weights + r * GROUP + t->pending * VL;
            UNROLL
            for (int v = 0; v < NV; v += 2)
                _mm512_storeu_si512(
                    to + v * VL, (__m512i)_mm512_cvtne2ps_pbh((__m512)p[v + 1], (__m512)p[v]));
#endif
        } else {
            float *to = weights + r * GROUP + t->pending * VL;
            UNROLL
            for (int v = 0; v < NV; v++) *(vf *)(to + v * VL) = p[v];
        }
    }
}

INLINE void queue_values(Tile *t, const Strip *strip) {
    for (int v = 0; v < strip->count; v++) t->waiting[t->pending + v] = strip->panel[v];
    t->pending += strip->count;
}

#define DOT 0
NOINLINE void strip_float(Tile *t, const Strip *strip) {
    /* one by one: a row that raises its maximum must not flush past the weights of those before */
    if (t->rows < 4) flush(t, DOT);
    FOR_ROWS(t, attend_strip, t, strip)
    queue_values(t, strip);
}
#undef DOT

#if HAS_DOT
#define DOT 1
NOINLINE void strip_dot(Tile *t, const Strip *strip) {
    /* one by one: a row that raises its maximum must not flush past the weights of those before */
    if (t->rows < 4) flush(t, DOT);
    FOR_ROWS(t, attend_strip, t, strip)
    queue_values(t, strip);
}
#undef DOT
#endif

/* The float mask of a strip, in the scale of exp2. */
static void load_bias(Tile *t, const Strip *strip) {
    const Call *c = t->job->call;
    const float *base = (const float *)c->attn_mask + t->b * c->m_stride[0] + t->h * c->m_stride[1];
    for (int r = 0; r < t->rows; r++)
        for (int v = 0; v < NV; v++) {
            float *to = t->s->bias + (r * NV + v) * VL;
            const float *from = base + (t->row + r) * c->m_stride[2];
            for (int i = 0; i < VL; i++) {
                int64_t key = strip->key[v] + i;
                if (key >= c->len_k) key = c->len_k - 1; /* that lane is masked */
                float bias = from[key * c->m_stride[3]] * LOG2E;
                /* the lowest finite value must not become -inf: a row of it is a plain mean */
                to[i] = bias < -2e38f && from[key * c->m_stride[3]] > -INFINITY ? -2e38f : bias;
            }
        }
}

static void run_strip(Tile *t, Strip *strip) {
    if (!strip->count) return;
    for (int v = strip->count; v < NV; v++) {
        strip->panel[v] = strip->panel[0];
        strip->key[v] = strip->key[0];
        strip->masked = 1; /* their bits are 0 */
    }
    strip->biased = t->job->call->attn_mask_kind == MASK_FLOAT;
    if (strip->biased) load_bias(t, strip);
#if HAS_DOT
    if (t->job->use_dot) strip_dot(t, strip);
    else strip_float(t, strip);
#else
    strip_float(t, strip);
#endif
    strip->count = 0;
}

/* Lanes of a panel that one row sees, of those in `bits`. */
static uint32_t row_lanes(const Tile *t, const PanelRef *p, const uint64_t *entry, int r) {
    const Call *c = t->job->call;
    int64_t row = t->row + r;
    uint32_t bits = p->bits;
    if (entry) {
        int64_t inside = p->key % c->block_k;
        uint64_t word = entry[(row - t->first_row) * c->mask_words + inside / 64];
        bits &= (uint32_t)(word >> (inside % 64));
    }
    if (c->is_causal && p->key + VL - 1 > row)
        bits &= p->key > row ? 0 : ALL_LANES >> (VL - 1 - (row - p->key));
    if (c->attn_mask_kind == MASK_BOOL && c->m_stride[2]) {
        const uint8_t *m = (const uint8_t *)c->attn_mask + t->b * c->m_stride[0] +
                           t->h * c->m_stride[1] + row * c->m_stride[2];
        for (int i = 0; i < VL; i++)
            if (bits >> i & 1 && !m[(p->key + i) * c->m_stride[3]]) bits &= ~(1u << i);
    }
    return bits;
}

/* One group of panels for one tile: panels that no row sees are left out. */
static void attend_group(Tile *t, const PanelRef *panels, int count) {
    const Job *job = t->job;
    const Call *c = job->call;
    int by_row = c->attn_mask_kind == MASK_BOOL && c->m_stride[2];
    Strip strip = {0};
    uint64_t common = 0; /* lanes that all rows see */
    for (int n = 0; n < count; n++) {
        const PanelRef *p = &panels[n];
        const uint64_t *entry = p->block < 0 ? NULL : t->s->entry_bits[p->block];
        int shift = strip.count * VL;
        if (shift == 0) {
            strip.masked = 0;
            common = 0;
            memset(strip.visible, 0, sizeof strip.visible);
        }
        if (by_row || entry || (c->is_causal && p->key + VL - 1 > t->row)) {
            uint32_t lanes[MR], any = 0;
            for (int r = 0; r < t->rows; r++) any |= lanes[r] = row_lanes(t, p, entry, r);
            if (!any) continue;
            for (int r = 0; r < t->rows; r++) strip.visible[r] |= (uint64_t)lanes[r] << shift;
            strip.masked = 1;
        } else {
            common |= (uint64_t)p->bits << shift;
            strip.masked |= p->bits != ALL_LANES;
        }
        strip.panel[strip.count] = p->panel;
        strip.key[strip.count++] = p->key;
        if (strip.count == NV || n == count - 1) {
            for (int r = 0; r < t->rows; r++) strip.visible[r] |= common;
            run_strip(t, &strip);
        }
    }
    if (strip.count) { /* the last panels of the group were left out */
        for (int r = 0; r < t->rows; r++) strip.visible[r] |= common;
        run_strip(t, &strip);
    }
    flush(t, job->use_dot);
}

/* ---- one work item: some rows of a query block ------------------------------------------------ */

/* Lanes of a panel that exist and that a mask over keys alone lets through. */
static uint32_t key_lanes(const Job *job, int64_t b, int64_t h, int64_t key, int64_t end) {
    const Call *c = job->call;
    uint32_t bits = end - key >= VL ? ALL_LANES : (1u << (end - key)) - 1;
    if (c->attn_mask_kind == MASK_BOOL && !c->m_stride[2]) {
        const uint8_t *m =
            (const uint8_t *)c->attn_mask + b * c->m_stride[0] + h * c->m_stride[1];
        for (int i = 0; i < VL; i++)
            if (bits >> i & 1 && !m[(key + i) * c->m_stride[3]]) bits &= ~(1u << i);
    }
    return bits;
}

/* The panels of a query block; -1 if its list is not valid. */
static int64_t list_panels(const Job *job, Scratch *s, int64_t b, int64_t h, int64_t block,
                           int64_t last_row) {
    const Call *c = job->call;
    int64_t at = b * c->list_stride[0] + h * c->list_stride[1] + block * c->list_stride[2];
    const uint8_t *kept = c->block_mask ? c->block_mask + at : NULL;
    int64_t entries = job->num_k, count = 0;
    if (!kept) entries = c->counts[at / c->list_width];
    if (entries < 0 || (!kept && entries > c->list_width)) return -1;
    for (int64_t n = 0; n < entries; n++) {
        int64_t k = n;
        int masked = 0;
        if (kept) {
            if (!kept[n]) continue;
        } else {
            k = c->indices[at + n];
            int32_t id = c->mask_ids ? c->mask_ids[at + n] : -1;
            masked = id >= 0;
            if (k < 0 || k >= job->num_k || id >= c->num_masks) return -1;
            if (masked) s->entry_bits[n] = c->mask_bits + id * c->block_q * c->mask_words;
        }
        int64_t start = k * c->block_k, end = start + c->block_k;
        if (end > c->len_k) end = c->len_k;
        if (c->is_causal && end > last_row + 1) end = last_row + 1;
        for (int64_t key = start; key < end; key += VL) {
            uint32_t bits = key_lanes(job, b, h, key, end);
            if (!bits) continue;
            PanelRef *p = &s->panels[count++];
            p->panel = (int32_t)(k * job->panels_per_block + (key - start) / VL);
            p->key = (int32_t)key;
            p->block = masked ? (int32_t)n : -1;
            p->bits = bits;
        }
    }
    return count;
}

static void load_queries(const Job *job, Scratch *s, const void *src, int64_t rows) {
    const Call *c = job->call;
    int64_t row = c->q_stride[2], step = c->q_stride[3], depth = job->depth;
    for (int64_t r = 0; r < rows; r++, src = (const char *)src + row * size_of(c)) {
        int64_t d = 0;
        if (job->use_dot) {
            uint16_t *to = (uint16_t *)s->q + r * 2 * depth;
            if (job->sign == 1 && step == 1) {
                memcpy(to, src, 2 * (size_t)c->dim);
                d = c->dim;
            }
            for (; d < 2 * depth; d++)
                to[d] = d < c->dim ? to_bfloat(job->sign * load_element(src, d * step, BFLOAT16)) : 0;
            continue;
        }
        float *to = s->q + r * depth;
        if (step == 1)
            for (; d + VL <= depth; d += VL)
                *(vfu *)(to + d) = load_floats(src, d, c->dtype) * splat(job->sign);
        for (; d < depth; d++) to[d] = job->sign * load_element(src, d * step, c->dtype);
    }
}

static void store_rows(const Job *job, const Scratch *s, void *dst, float *lse, int64_t rows) {
    const Call *c = job->call;
    int64_t width = job->vectors_v * VL, step = c->o_stride[3];
    for (int64_t r = 0; r < rows; r++, dst = (char *)dst + c->o_stride[2] * size_of(c)) {
        const float *from = s->out + r * width;
        float sum = 0;
        for (int i = 0; i < VL; i++) sum += s->sums[r * VL + i];
        /* nothing seen: zeros and -inf; NaN stays NaN */
        float inverse = sum == 0 ? 0 : 1 / sum;
        int64_t d = 0;
        if (step == 1)
            for (; d + VL <= c->dim_v; d += VL)
                store_floats(dst, d, *(const vf *)(from + d) * splat(inverse), c->dtype);
        for (; d < c->dim_v; d++) store_element(dst, d * step, from[d] * inverse, c->dtype);
        if (lse) lse[r] = sum == 0 ? -INFINITY : (s->maxima[r] + log2f(sum)) * LN2;
    }
}

/* A share of the next group's panels is fetched while each tile of this group is computed: panels lie
 * anywhere in the head, so the hardware does not see the next one coming. */
static void prefetch_panels(const Tile *t, const PanelRef *panels, int count, int64_t share,
                            int64_t shares) {
    int64_t from = count * share / shares, to = count * (share + 1) / shares;
    for (int64_t n = from; n < to; n++) {
        const char *k = t->keys + panels[n].panel * t->job->k_panel_bytes;
        const char *v = t->values + panels[n].panel * t->job->v_panel_bytes;
        for (int64_t i = 0; i < t->job->k_panel_bytes; i += 64) __builtin_prefetch(k + i, 0, 2);
        for (int64_t i = 0; i < t->job->v_panel_bytes; i += 64) __builtin_prefetch(v + i, 0, 2);
    }
}

static void attend_item(Job *job, Scratch *s, int64_t group, int64_t item) {
    const Call *c = job->call;
    int64_t size = size_of(c), b = group / c->kv_heads;
    int64_t per_head = job->num_q * job->chunks_per_block;
    int64_t h = group % c->kv_heads * (c->heads / c->kv_heads) + item / per_head;
    int64_t block = item % per_head / job->chunks_per_block;
    int64_t first = block * c->block_q;
    int64_t row = first + item % job->chunks_per_block * job->rows_per_item;
    int64_t end = row + job->rows_per_item;
    if (end > first + c->block_q) end = first + c->block_q;
    if (end > c->len_q) end = c->len_q;
    int64_t rows = end - row, width = job->vectors_v * VL;
    if (rows <= 0) return;
    load_queries(job, s,
                 (const char *)c->query +
                     (b * c->q_stride[0] + h * c->q_stride[1] + row * c->q_stride[2]) * size,
                 rows);
    memset(s->out, 0, sizeof(float) * (size_t)(rows * width));
    memset(s->sums, 0, sizeof(float) * (size_t)(rows * VL));
    for (int64_t r = 0; r < rows; r++) s->maxima[r] = s->limits[r] = -FLT_MAX;
    int64_t count = list_panels(job, s, b, h, block, end - 1);
    if (count < 0) {
        atomic_store(&job->invalid, 1);
        return;
    }
    Tile t = {.job = job, .keys = slot_of(job, group), .s = s, .b = b, .h = h, .first_row = first};
    t.values = t.keys + job->num_panels * job->k_panel_bytes;
    int64_t tiles = (rows + MR - 1) / MR;
    for (int64_t n = 0; n < count; n += GROUP_PANELS) {
        int group_size = (int)(count - n < GROUP_PANELS ? count - n : GROUP_PANELS);
        int64_t left = count - n - group_size;
        int next_size = (int)(left < GROUP_PANELS ? left : GROUP_PANELS);
        for (int64_t i = 0; i < tiles; i++) {
            prefetch_panels(&t, s->panels + n + group_size, next_size, i, tiles);
            int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles; /* even tiles */
            t.row = row + from;
            t.rows = (int)(to - from);
            t.q = s->q + from * job->depth;
            t.out = s->out + from * width;
            t.sums = s->sums + from * VL;
            t.maxima = s->maxima + from;
            t.limits = s->limits + from;
            attend_group(&t, s->panels + n, group_size);
        }
    }
    store_rows(job, s,
               (char *)c->out +
                   (b * c->o_stride[0] + h * c->o_stride[1] + row * c->o_stride[2]) * size,
               c->lse ? c->lse + (b * c->heads + h) * c->len_q + row : NULL, rows);
}

/* ---- threads ---------------------------------------------------------------------------------- */

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

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

static int open_scratch(const Job *job, Scratch *s) {
    const Call *c = job->call;
    size_t rows = (size_t)job->rows_per_item, width = (size_t)job->vectors_v * VL;
    size_t entries = (size_t)(c->block_mask ? job->num_k : c->list_width);
    size_t sizes[] = {
        padded(4 * rows * (size_t)job->depth), padded(4 * rows * width),
        padded(4 * MR * GROUP + 2 * VECTOR_BYTES * NV), padded(4 * rows * VL), padded(4 * rows),
        padded(4 * rows), padded(4 * MR * NV * VL),
        padded(sizeof(PanelRef) * entries * (size_t)job->panels_per_block),
        padded(sizeof(uint64_t *) * entries),
    };
    size_t total = 0, count = sizeof sizes / sizeof *sizes;
    for (size_t i = 0; i < count; i++) total += sizes[i];
    char *at = s->base = allocate(total);
    if (!at) return 0;
    void **fields[] = {(void **)&s->q,      (void **)&s->out,    (void **)&s->weights,
                       (void **)&s->sums,   (void **)&s->maxima, (void **)&s->limits,
                       (void **)&s->bias,   (void **)&s->panels, (void **)&s->entry_bits};
    for (size_t i = 0; i < count; at += sizes[i++]) *fields[i] = at;
    return 1;
}

/* Items are claimed in order, and wait only for items that were claimed before: no deadlock. */
static void *work(void *argument) {
    Job *job = argument;
    Scratch s;
    if (!open_scratch(job, &s)) return NULL;
    for (;;) {
        int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->items) break;
        int64_t each = job->pack_items + job->attend_items, group = item / each;
        if (item % each < job->pack_items) {
            if (group >= job->slots)
                while (atomic_load(&job->attends_done[group - job->slots]) < job->attend_items)
                    sched_yield();
            pack_item(job, group, item % each);
            atomic_fetch_add(&job->packs_done[group], 1);
        } else {
            while (atomic_load(&job->packs_done[group]) < job->pack_items) sched_yield();
            attend_item(job, &s, group, item % each - job->pack_items);
            atomic_fetch_add(&job->attends_done[group], 1);
        }
    }
    free(s.base);
    return NULL;
}

static void plan_job(Job *job, const Call *c) {
    job->call = c;
    job->use_dot = HAS_DOT && c->dtype == BFLOAT16;
    job->num_q = (c->len_q + c->block_q - 1) / c->block_q;
    job->num_k = (c->len_k + c->block_k - 1) / c->block_k;
    job->panels_per_block = (c->block_k + VL - 1) / VL;
    job->num_panels = job->num_k * job->panels_per_block;
    job->depth = job->use_dot ? (c->dim + 1) / 2 : c->dim;
    job->vectors_v = (c->dim_v + VL - 1) / VL;
    job->k_panel_bytes = job->depth * VECTOR_BYTES;
    job->v_panel_bytes = job->vectors_v * VECTOR_BYTES * (job->use_dot ? VL / 2 : VL);
    job->slot_bytes = job->num_panels * (job->k_panel_bytes + job->v_panel_bytes);
    job->groups = c->batch * c->kv_heads;
    /* fewer rows per item where there would be too few items for the threads */
    int64_t rows = c->block_q < MAX_ROWS ? c->block_q : MAX_ROWS;
    int64_t blocks = c->batch * c->heads * job->num_q;
    while (rows > 4 * MR && blocks * ((c->block_q + rows - 1) / rows) < 4 * c->threads)
        rows = (rows / 2 + MR - 1) / MR * MR;
    job->rows_per_item = rows;
    job->chunks_per_block = (c->block_q + rows - 1) / rows;
    job->attend_items = c->heads / c->kv_heads * job->num_q * job->chunks_per_block;
    job->pack_items = (job->num_panels * VL + PACK_KEYS - 1) / PACK_KEYS;
    job->items = job->groups * (job->attend_items + job->pack_items);
    int64_t slots = c->threads == 1 ? 1 : 2 + 4 * c->threads / job->attend_items;
    while (slots > 2 && slots * job->slot_bytes > (int64_t)64 << 20) slots--;
    job->slots = (int)(slots < job->groups ? slots : job->groups);
    job->sign = c->scale < 0 ? -1.0f : c->scale > 0 ? 1.0f : 0.0f;
    job->factor = c->scale == 0 ? 1.0f : fabsf(c->scale) * LOG2E;
}

/* Vector bytes, and whether bfloat16 dot products are used: for reports. */
int retrofit_native_info(void) { return VECTOR_BYTES * 2 + HAS_DOT; }

size_t retrofit_native_call_size(void) { return sizeof(Call); }

/* 0 when done, 1 when memory ran out, 2 if a list names what does not exist. */
int retrofit_block_sparse(const Call *call) {
    Job job;
    memset(&job, 0, sizeof job);
    plan_job(&job, call);
    if (!job.items) return 0;
    int status = 1, threads = call->threads, started = 0;
    if (threads > job.items) threads = (int)job.items;
    void *counters = calloc((size_t)job.groups * 2, sizeof(_Atomic int64_t));
    pthread_t *handles = calloc((size_t)threads, sizeof(pthread_t));
    job.packed = allocate((size_t)(job.slots * job.slot_bytes));
    if (counters && handles && job.packed) {
        job.packs_done = counters;
        job.attends_done = job.packs_done + job.groups;
        /* a thread that can't be started leaves its share to the others */
        while (started < threads - 1 && !pthread_create(&handles[started], NULL, work, &job))
            started++;
        work(&job);
        for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
        status = atomic_load(&job.next) < job.items ? 1 : atomic_load(&job.invalid) ? 2 : 0;
    }
    free(job.packed);
    free(counters);
    free(handles);
    return status;
}
