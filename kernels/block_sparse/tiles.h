/* What a strip of query rows makes of up to KEYS keys: scores, weights, weights times values.
 *
 * Tiles of keys (then of channels) by all vectors of the strip are computed in registers. The maximum
 * of a row is raised only when a score exceeds it by 2^LAZY; until then weights above 1 are harmless,
 * and the output needs no rescaling.
 */

#pragma once

#include "strips.h"

/* ---- weights ----------------------------------------------------------------------------------- */

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
        vf shrink = vexp2(before - maximum, 0); /* exactly 1 for the other rows: these may be many */
        shrink = (vf)((over & (vi)shrink) | (~over & (vi)splat(1)));
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
INLINE void value_tile(const Strip *t, const Work *w, const Rows *rows, int64_t first, int64_t dims,
                       const int channels, const int width, const int dot) {
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
        const uint32_t *pair = w->pairs + n * dims + first;
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
    (void)dims;
    UNROLL
    for (int i = 0; i < channels; i++)
        UNROLL
        for (int v = 0; v < width; v++) out[i * NV + v] += acc[i][v];
}

/* ---- all keys of a run ------------------------------------------------------------------------- */

typedef struct {
    void (*weigh_six)(const Shape *, Strip *, const Work *, const Run *, int, int);
    void (*weigh_four)(const Shape *, Strip *, const Work *, const Run *, int, int); /* or NULL */
    void (*value_six)(const Strip *, const Work *, const Rows *, int64_t, int64_t);
    void (*value_four)(const Strip *, const Work *, const Rows *, int64_t, int64_t);
    void (*value_one)(const Strip *, const Work *, const Rows *, int64_t, int64_t);
} Tiles;

/* Each is a function of its own: what one hoists would cost another its registers. */
#define WEIGH(name, keys, width, dot)                                                              \
    static void name(const Shape *s, Strip *t, const Work *w, const Run *run, int first,           \
                     int masked) {                                                                 \
        weigh_tile(s, t, w, run, first, keys, masked, width, dot);                                 \
    }
#define VALUE(name, channels, width, dot)                                                          \
    static void name(const Strip *t, const Work *w, const Rows *rows, int64_t first,               \
                     int64_t dims) {                                                               \
        value_tile(t, w, rows, first, dims, channels, width, dot);                                 \
    }
/* A compiler takes a second for these: few kinds are made for strips that don't fill all vectors. The
 * rest computes lanes that hold no row, which nobody reads. */
#define NARROW(name, width, dot)                                                                   \
    WEIGH(name##_weigh_six, MR, width, dot)                                                        \
    VALUE(name##_value_six, MR, width, dot)                                                        \
    VALUE(name##_value_four, 4, width, dot)
#define WIDE(name, dot)                                                                            \
    NARROW(name, NV, dot)                                                                          \
    WEIGH(name##_weigh_four, 4, NV, dot)                                                           \
    VALUE(name##_value_one, 1, NV, dot)
#define TILES(name, four, one) {name##_weigh_six, four, name##_value_six, name##_value_four, one}

WIDE(floats, 0)
NARROW(one_float, 1, 0)
#if HAS_DOT
WIDE(dots, 1)
NARROW(one_dot, 1, 1)
NARROW(two_dots, 2, 1)
#endif
#if NV == 4
NARROW(two_floats, 2, 0)
#endif

/* By width / 2, and from 3 on for dot products. */
static const Tiles TILES_OF[] = {
    TILES(one_float, NULL, floats_value_one),
#if NV == 4
    TILES(two_floats, NULL, floats_value_one),
#endif
    TILES(floats, floats_weigh_four, floats_value_one),
#if HAS_DOT
    TILES(one_dot, NULL, dots_value_one),
    TILES(two_dots, NULL, dots_value_one),
    TILES(dots, dots_weigh_four, dots_value_one),
#endif
};

/* How many tiles of 4 keys leave least to spare beside those of MR. */
INLINE int count_fours(const Tiles *tiles, int count) {
    static const int8_t of_rest[MR] = {0, 2, 2, 1, 1, 0};
    return !tiles->weigh_four ? 0 : count <= 4 ? 1 : of_rest[count % MR];
}

/* The last tile may have keys that are there to fill it only: no lane sees them. Returns the tiles of
 * MR keys, which come first. */
static int fill_run(Run *run, int fours, uint64_t all) {
    int count = run->rows->count, rest = count - 4 * fours;
    int sixes = rest > 0 ? (rest + MR - 1) / MR : 0, filled = MR * sixes + 4 * fours;
    if (!run->masked) /* it may matter for the last tile */
        for (int i = filled - MR > 0 ? filled - MR : 0; i < count; i++) run->seen[i] = all;
    for (int i = count; i < filled; i++) {
        run->rows->key[i] = run->rows->key[0];
        run->seen[i] = 0;
    }
    return sixes;
}

/* Add up to KEYS keys to the rows of a strip; what lies ahead is fetched meanwhile. */
static void attend_run(const Shape *s, Strip *t, Work *w, Run *run, const Ahead *ahead) {
    const Tiles *tiles = &TILES_OF[t->width / 2 + (s->use_dot ? 3 : 0)];
    int count = run->rows->count, fours = count_fours(tiles, count), first = 0, share = 0;
    if (!count) return;
    uint64_t all = lanes_of(t->rows);
    int sixes = fill_run(run, fours, all);
    for (int i = 0; i < sixes + fours; i++) {
        int keys = i < sixes ? MR : 4, masked = 0;
        if (run->masked || first + keys > count)
            for (int n = 0; n < keys; n++) masked |= run->seen[first + n] != all;
        (i < sixes ? tiles->weigh_six : tiles->weigh_four)(s, t, w, run, first, masked);
        first += keys;
    }
    if (s->use_dot && w->paired != run->rows) pair_values(s, w, run->rows);
    w->paired = run->masked ? NULL : run->rows; /* strips that leave out no key share their values */
    int64_t dims = s->dim_v, step;
    int shares = (int)((dims + MR - 1) / MR);
    for (int64_t channel = 0; channel < dims; channel += step) {
        int64_t left = dims - channel;
        step = left < 4 ? 1 : left < MR || left == 8 ? 4 : MR;
        if (share < shares) fetch_ahead(ahead, share++, shares);
        (step == MR ? tiles->value_six : step == 4 ? tiles->value_four : tiles->value_one)(
            t, w, run->rows, channel, dims);
    }
}
