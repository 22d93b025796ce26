/* A tile of at most MR query rows over strips of NV panels: scores, weights, weights times values. */

#pragma once

#include "panels.h"

typedef struct {
    const Job *job;
    const char *keys, *values; /* panels of the head */
    const char *last_values;   /* a short last panel that lies apart, or NULL */
    Scratch *s;
    const float *q; /* of this tile */
    float *out, *sums, *maxima, *limits;
    int64_t row;     /* first query row */
    int rows;        /* at most MR */
    int64_t b, h, first_row; /* first_row: of the query block */
    /* panels whose weights wait to be multiplied with their values */
    int pending;
    const char *waiting[GROUP_PANELS];
} Tile;

INLINE const char *values_of(const Tile *t, int64_t panel) {
    if (t->last_values && panel == t->job->last_panel) return t->last_values;
    return t->values + panel * t->job->v_panel_bytes;
}

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
        const char *panel = t->waiting[n] + column * 4;
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
        float top = largest_lane(best);
        if (!(top > t->limits[r])) continue;
        float maximum = top * factor, before = t->maxima[r];
        t->maxima[r] = maximum;
        t->limits[r] = (maximum + LAZY) / factor;
        if (!(before > -FLT_MAX)) continue; /* all sums and weights are 0 */
        float shrink = exp2f(before - maximum);
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
    for (int v = 0; v < strip->count; v++)
        t->waiting[t->pending++] = values_of(t, strip->panel[v]);
}

#define DOT 0
NOINLINE void strip_float(Tile *t, const Strip *strip) {
    FOR_ROWS(t, attend_strip, t, strip)
    queue_values(t, strip);
}
#undef DOT

#if HAS_DOT
#define DOT 1
NOINLINE void strip_dot(Tile *t, const Strip *strip) {
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

/* Whether every row of the query block sees all of the next NV panels. */
INLINE int is_open(const PanelRef *panels) {
    int open = 1;
    UNROLL
    for (int v = 0; v < NV; v++) open &= panels[v].block < 0 && panels[v].bits == ALL_LANES;
    return open;
}

INLINE void run_open_strip(Tile *t, const PanelRef *panels) {
    Strip strip;
    strip.masked = 0;
    strip.count = NV;
    UNROLL
    for (int v = 0; v < NV; v++) {
        strip.panel[v] = panels[v].panel;
        strip.key[v] = panels[v].key;
    }
    run_strip(t, &strip);
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
    int n = 0;
    if (!by_row && !c->is_causal)
        for (; n + NV <= count && is_open(panels + n); n += NV) run_open_strip(t, panels + n);
    for (; n < count; n++) {
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
