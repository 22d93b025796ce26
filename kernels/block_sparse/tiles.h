/* What a strip of query rows makes of up to KEYS keys: scores, weights, weights times values.
 *
 * Tiles of keys (then of channels) by all vectors of the strip are computed in registers. The maximum
 * of a row is raised only when a score exceeds it by 2^LAZY; until then weights above 1 are harmless,
 * and the output needs no rescaling.
 */

#pragma once

#include "strips.h"

/* ---- weights ----------------------------------------------------------------------------------- */

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

/* The maxima of rows with a score above their limit become those scores; what these rows summed
 * before shrinks, and so do the weights of the first `waiting` keys, whose values are not added yet. */
NOINLINE void raise_maxima(const Shape *s, Strip *t, const Work *w, const vf *scores, int keys,
                           int waiting, float factor) {
    for (int v = 0; v < t->width; v++) {
        vf best = scores[v];
        for (int i = 1; i < keys; i++) best = vmax(best, scores[i * NV + v]);
        vi over = best > t->limits[v];
        if (!any_lane(over)) continue;
        vf before = t->maxima[v];
        vf maximum = (vf)((over & (vi)(best * splat(factor))) | (~over & (vi)before));
        vf shrink = vexp2(before - maximum, 0);
        t->maxima[v] = maximum;
        t->limits[v] = (maximum + splat(LAZY)) / splat(factor);
        t->sums[v] *= shrink;
        for (int64_t d = 0; d < s->dim_v; d++) t->out[d * NV + v] *= shrink;
#if HAS_DOT
        for (int i = 0; s->use_dot && i < waiting / 2; i++) {
            vf *pair = w->weights + i * NV + v;
            *pair = pair_weights(first_of(*pair) * shrink, second_of(*pair) * shrink);
        }
#endif
        for (int i = 0; !s->use_dot && i < waiting; i++) w->weights[i * NV + v] *= shrink;
    }
}

/* Lanes that do not see a key get -inf. */
INLINE vf hide(vf score, uint64_t seen, int v) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_mask_mov_ps((__m512)splat(-INFINITY), (__mmask16)(seen >> v * VL), (__m512)score);
#else
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = 1 << i;
    vi sees = (splat_bits((uint32_t)(seen >> v * VL)) & lane) != 0;
    return (vf)((sees & (vi)score) | (~sees & (vi)splat(-INFINITY)));
#endif
}

/* Adds a mask of floats to the scores of a tile. */
NOINLINE void add_bias(const Shape *s, const Strip *t, const Work *w, int first, int keys, vf *scores) {
    for (int i = 0; i < keys; i++, scores += NV)
        for (int v = 0; v < t->width; v++)
            scores[v] = scores[v] * splat(s->factor) + w->bias[(first + i) * NV + v];
}

/* Weights of the keys `first`, ..., `first + keys - 1`, and their part of the sums. */
INLINE void weigh_tile(const Shape *s, Strip *t, const Work *w, const Run *run, int first,
                       const int keys, int masked, const int width, const int dot) {
    const char *const *row = run->rows->key + first;
    const vf *queries = t->queries;
    int64_t depth = s->depth;
    vf acc[MR][NV];
    UNROLL
    for (int i = 0; i < keys; i++)
        UNROLL
        for (int v = 0; v < width; v++) acc[i][v] = (vf){0};
    for (int64_t d = 0; d < depth; d++) {
        vf x[NV];
        UNROLL
        for (int v = 0; v < width; v++) x[v] = queries[d * NV + v];
        UNROLL
        for (int i = 0; i < keys; i++) {
#if HAS_DOT
            if (dot) {
                __m512bh key = (__m512bh)_mm512_set1_epi32((int)((const word_t *)row[i])[d]);
                UNROLL
                for (int v = 0; v < width; v++)
                    acc[i][v] = (vf)_mm512_dpbf16_ps((__m512)acc[i][v], key, (__m512bh)x[v]);
                continue;
            }
#endif
            vf key = splat(((const float *)row[i])[d]);
            UNROLL
            for (int v = 0; v < width; v++) acc[i][v] += key * x[v];
        }
    }
    float factor = dot && !s->biased ? s->factor : 1;
    if (__builtin_expect(s->biased, 0)) {
        vf scores[MR * NV];
        UNROLL
        for (int i = 0; i < keys; i++)
            UNROLL
            for (int v = 0; v < width; v++) scores[i * NV + v] = acc[i][v];
        add_bias(s, t, w, first, keys, scores);
        UNROLL
        for (int i = 0; i < keys; i++)
            UNROLL
            for (int v = 0; v < width; v++) acc[i][v] = scores[i * NV + v];
    }
    if (masked)
        UNROLL
        for (int i = 0; i < keys; i++)
            UNROLL
            for (int v = 0; v < width; v++) acc[i][v] = hide(acc[i][v], run->seen[first + i], v);
    vi over = {0};
    UNROLL
    for (int v = 0; v < width; v++) {
        vf best = vmax(acc[0][v], acc[1][v]);
        UNROLL
        for (int i = 2; i < keys; i++) best = vmax(best, acc[i][v]);
        over |= best > t->limits[v];
    }
    if (__builtin_expect(any_lane(over), 0)) {
        vf scores[MR * NV];
        UNROLL
        for (int i = 0; i < keys; i++)
            UNROLL
            for (int v = 0; v < width; v++) scores[i * NV + v] = acc[i][v];
        raise_maxima(s, t, w, scores, keys, first, factor);
    }
    const vf *maxima = t->maxima;
    vf *sums = t->sums, *weights = w->weights + (int64_t)(dot ? first / 2 : first) * NV;
    UNROLL
    for (int v = 0; v < width; v++) {
        vf top = maxima[v], sum;
        UNROLL
        for (int i = 0; i < keys; i += 2) {
            vf a = dot ? acc[i][v] * splat(factor) - top : acc[i][v] - top;
            vf b = dot ? acc[i + 1][v] * splat(factor) - top : acc[i + 1][v] - top;
            a = vexp2(a, dot);
            b = vexp2(b, dot);
            sum = i ? sum + (a + b) : a + b;
#if HAS_DOT
            if (dot) {
                weights[i / 2 * NV + v] = pair_weights(a, b);
                continue;
            }
#endif
            weights[i * NV + v] = a;
            weights[(i + 1) * NV + v] = b;
        }
        sums[v] += sum;
    }
}

/* ---- values ------------------------------------------------------------------------------------ */

/* Weights times values, for the channels `first`, ..., `first + channels - 1`. */
INLINE void value_tile(const Shape *s, const Strip *t, const Work *w, const Rows *rows,
                       int64_t first, const int channels, const int width, const int dot) {
    const vf *weights = w->weights;
    vf acc[MR][NV], *out = t->out + first * NV;
    UNROLL
    for (int i = 0; i < channels; i++)
        UNROLL
        for (int v = 0; v < width; v++) acc[i][v] = (vf){0};
    int steps = dot ? (rows->count + 1) / 2 : rows->count;
    for (int n = 0; n < steps; n++) {
        vf x[NV];
        UNROLL
        for (int v = 0; v < width; v++) x[v] = weights[n * NV + v];
#if HAS_DOT
        const uint32_t *pair = w->pairs + n * s->dim_v + first;
#endif
        const float *value = (const float *)rows->value[n] + first;
        UNROLL
        for (int i = 0; i < channels; i++) {
#if HAS_DOT
            if (dot) {
                __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair[i]);
                UNROLL
                for (int v = 0; v < width; v++)
                    acc[i][v] = (vf)_mm512_dpbf16_ps((__m512)acc[i][v], both, (__m512bh)x[v]);
                continue;
            }
#endif
            vf one = splat(value[i]);
            UNROLL
            for (int v = 0; v < width; v++) acc[i][v] += one * x[v];
        }
    }
    (void)s;
    UNROLL
    for (int i = 0; i < channels; i++)
        UNROLL
        for (int v = 0; v < width; v++) out[i * NV + v] += acc[i][v];
}

/* ---- all keys of a run ------------------------------------------------------------------------- */

/* `count` as tiles of MR and of 4, with at most 3 to spare (1 from 4 on). */
INLINE int tiles_of_four(int count) {
    static const int8_t of_rest[MR] = {0, 2, 2, 1, 1, 0};
    return count <= 4 ? 1 : of_rest[count % MR];
}

/* The tile's last keys may be there to fill it only: no lane sees them. */
static int fill_run(Run *run, uint64_t all) {
    int count = run->rows->count, fours = tiles_of_four(count);
    int sixes = count <= 4 ? 0 : (count - 4 * fours + MR - 1) / MR, filled = MR * sixes + 4 * fours;
    if (!run->masked) /* it may matter for the last tile */
        for (int i = filled - MR > 0 ? filled - MR : 0; i < count; i++) run->seen[i] = all;
    for (int i = count; i < filled; i++) {
        run->rows->key[i] = run->rows->key[0];
        run->seen[i] = 0;
    }
    return sixes;
}

typedef void Weigh(const Shape *, Strip *, const Work *, const Run *, int, int);
typedef void Value(const Shape *, const Strip *, const Work *, const Rows *, int64_t);

/* Each kind of tile is a function of its own: what one hoists would cost another its registers. */
#define TILES(kind, width, dot)                                                                    \
    WEIGH(weigh_##kind##_##width##x6, 6, width, dot)                                               \
    WEIGH(weigh_##kind##_##width##x4, 4, width, dot)                                               \
    VALUE(value_##kind##_##width##x6, 6, width, dot)                                               \
    VALUE(value_##kind##_##width##x4, 4, width, dot)                                               \
    VALUE(value_##kind##_##width##x1, 1, width, dot)
#define WEIGH(name, keys, width, dot)                                                              \
    static void name(const Shape *s, Strip *t, const Work *w, const Run *run, int first,           \
                     int masked) {                                                                 \
        weigh_tile(s, t, w, run, first, keys, masked, width, dot);                                 \
    }
#define VALUE(name, channels, width, dot)                                                          \
    static void name(const Shape *s, const Strip *t, const Work *w, const Rows *rows,              \
                     int64_t first) {                                                              \
        value_tile(s, t, w, rows, first, channels, width, dot);                                    \
    }
#define WEIGHERS(kind, width) {weigh_##kind##_##width##x6, weigh_##kind##_##width##x4}
#define VALUERS(kind, width)                                                                       \
    {value_##kind##_##width##x6, value_##kind##_##width##x4, value_##kind##_##width##x1}

TILES(float, 1, 0)
TILES(float, 2, 0)
#if NV == 4
TILES(float, 4, 0)
#endif
#if HAS_DOT
TILES(dot, 1, 1)
TILES(dot, 2, 1)
TILES(dot, 4, 1)
#endif

static Weigh *const WEIGH_TILES[][2] = {
    WEIGHERS(float, 1), WEIGHERS(float, 2),
#if NV == 4
    WEIGHERS(float, 4),
#endif
#if HAS_DOT
    WEIGHERS(dot, 1),   WEIGHERS(dot, 2),   WEIGHERS(dot, 4),
#endif
};
static Value *const VALUE_TILES[][3] = {
    VALUERS(float, 1), VALUERS(float, 2),
#if NV == 4
    VALUERS(float, 4),
#endif
#if HAS_DOT
    VALUERS(dot, 1),   VALUERS(dot, 2),   VALUERS(dot, 4),
#endif
};

/* Add up to KEYS keys to the rows of a strip; what lies ahead is fetched meanwhile. */
static void attend_run(const Shape *s, Strip *t, Work *w, Run *run, const Ahead *ahead) {
    int count = run->rows->count, kind = t->width / 2 + (s->use_dot ? NV / 2 + 1 : 0), first = 0, share = 0;
    if (!count) return;
    uint64_t all = lanes_of(t->rows);
    int sixes = fill_run(run, all), tiles = sixes + tiles_of_four(count);
    for (int i = 0; i < tiles; i++) {
        int keys = i < sixes ? MR : 4, masked = 0;
        if (run->masked || first + keys > count)
            for (int n = 0; n < keys; n++) masked |= run->seen[first + n] != all;
        WEIGH_TILES[kind][i >= sixes](s, t, w, run, first, masked);
        first += keys;
    }
    if (s->use_dot && w->paired != run->rows) pair_values(s, w, run->rows);
    w->paired = run->masked ? NULL : run->rows; /* strips that leave out no key share their values */
    int64_t channels = s->dim_v, step;
    int shares = (int)((channels + MR - 1) / MR);
    for (int64_t channel = 0; channel < channels; channel += step) {
        int64_t left = channels - channel;
        step = left < 4 ? 1 : left < MR || left == 8 ? 4 : MR;
        if (share < shares) fetch_ahead(ahead, share++, shares);
        VALUE_TILES[kind][step == MR ? 0 : step == 4 ? 1 : 2](s, t, w, run->rows, channel);
    }
}
