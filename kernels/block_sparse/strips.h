/* A strip: up to LANES query rows side by side in the lanes of vectors, and the keys it meets.
 *
 * Queries, weights and outputs lie channel by channel (or key by key) with one lane for each row.
 * What a key or value holds is then one number for all lanes, read where it lies in memory: keys and
 * values are neither packed nor transposed, and a softmax needs no sums across lanes.
 */

#pragma once

#include "vectors.h"

typedef uint32_t word_t __attribute__((aligned(2), may_alias));

/* What the arithmetic needs to know of a call. */
typedef struct {
    int32_t dtype;
    int use_dot, biased;
    int copies_keys, copies_values; /* their rows are not what the arithmetic reads */
    int64_t dim, dim_v, depth;      /* depth: words of a key, floats or pairs of bfloat16 */
    float scale;  /* of queries as they are loaded; bfloat16 pairs stay as they are */
    float factor; /* of scores; logarithms are those of base 2 */
    uint32_t keep, flip; /* of the bits of a pair: a scale of 0, or a negative one */
} Shape;

typedef struct {
    vf *queries;                /* [depth][NV] */
    vf *out;                    /* [dim_v][NV] */
    vf *sums, *maxima, *limits; /* [NV] */
    int rows, width;            /* width: vectors that are computed: 1, 2 or 4 */
} Strip;

/* Rows of keys and values, wherever they lie. */
typedef struct {
    int count;
    const char *key[KEYS + MR], *value[KEYS + MR];
} Rows;

/* Keys as a strip sees them. */
typedef struct {
    Rows *rows;
    int masked;               /* whether `seen` matters */
    uint64_t seen[KEYS + MR]; /* the lanes that see a key */
} Run;

/* What one thread computes in. */
typedef struct {
    vf *weights;     /* [KEYS + MR][NV], or pairs of keys */
    vf *bias;        /* [KEYS + MR][NV], in the scale of exp2 */
    uint32_t *pairs; /* [KEYS / 2][dim_v], values of two keys in a word */
    const Rows *paired;  /* whose values these are, or NULL */
    char *keys, *values; /* [KEYS][depth] and [KEYS][dim_v], copies as floats */
} Work;

INLINE int64_t element_size(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static Shape shape_of(int dtype, int64_t dim, int64_t dim_v, float scale, int biased) {
    Shape s = {.dtype = dtype, .dim = dim, .dim_v = dim_v, .depth = dim, .biased = biased};
    s.use_dot = HAS_DOT && dtype == BFLOAT16;
    s.copies_keys = s.use_dot ? dim % 2 != 0 : dtype != FLOAT32;
    s.copies_values = !s.use_dot && dtype != FLOAT32;
    s.scale = scale * LOG2E;
    s.factor = 1;
    if (s.use_dot) {
        s.depth = (dim + 1) / 2;
        s.factor = scale == 0 ? 1 : fabsf(scale) * LOG2E;
        s.keep = scale == 0 ? 0 : ~0u;
        s.flip = scale < 0 ? 0x80008000u : 0;
    }
    return s;
}

/* Parts of one allocation, each on a cache line of its own. */
INLINE void *take(char **at, size_t bytes) {
    char *from = *at;
    *at += padded(bytes);
    return from;
}

INLINE size_t strip_bytes(const Shape *s) {
    return padded(VECTOR_BYTES * NV * (size_t)(s->depth + s->dim_v + 3));
}

INLINE Strip strip_at(const Shape *s, char *at) {
    Strip t = {.queries = (vf *)at};
    t.out = t.queries + s->depth * NV;
    t.sums = t.out + s->dim_v * NV;
    t.maxima = t.sums + NV;
    t.limits = t.maxima + NV;
    return t;
}

static size_t work_bytes(const Shape *s) {
    size_t keys = KEYS + MR, bytes = 2 * padded(keys * NV * VECTOR_BYTES);
    bytes += padded(KEYS / 2 * 4 * (size_t)s->dim_v);
    return bytes + padded(KEYS * 4 * (size_t)s->depth) + padded(KEYS * 4 * (size_t)s->dim_v);
}

static Work work_at(const Shape *s, char *at) {
    Work w = {.paired = NULL};
    w.weights = take(&at, (KEYS + MR) * NV * VECTOR_BYTES);
    w.bias = take(&at, (KEYS + MR) * NV * VECTOR_BYTES);
    w.pairs = take(&at, KEYS / 2 * 4 * (size_t)s->dim_v);
    w.keys = take(&at, KEYS * 4 * (size_t)s->depth);
    w.values = take(&at, KEYS * 4 * (size_t)s->dim_v);
    return w;
}

INLINE uint64_t lanes_of(int rows) { return rows == 64 ? ~(uint64_t)0 : ((uint64_t)1 << rows) - 1; }

/* ---- rows in, rows out ------------------------------------------------------------------------ */

/* One word of a query: a float, or two consecutive bfloat16 elements. */
INLINE uint32_t query_word(const Shape *s, const char *row, int64_t d) {
    uint32_t word;
    if (s->use_dot) {
        const uint16_t *from = (const uint16_t *)row + 2 * d;
        word = from[0] | (uint32_t)(2 * d + 1 < s->dim ? from[1] : 0) << 16;
        return (word & s->keep) ^ s->flip;
    }
    float value = load_element(row, d, s->dtype) * s->scale;
    memcpy(&word, &value, 4);
    return word;
}

/* Queries become columns; nothing has been summed yet. Lanes without a row hold zeros. */
static void load_strip(const Shape *s, Strip *t, const char *const *row, int rows) {
    int64_t whole = s->use_dot ? s->dim / 2 : s->dim;
    t->rows = rows;
    t->width = rows <= VL ? 1 : rows <= 2 * VL ? 2 : NV;
    for (int v = 0; v < t->width; v++) {
        const char *const *from = row + v * VL;
        int count = rows - v * VL < VL ? rows - v * VL : VL; /* may be negative */
        int64_t d = 0;
        for (; d + VL <= whole; d += VL) {
            vf x[VL];
            UNROLL
            for (int j = 0; j < VL; j++) {
                x[j] = (vf){0};
                if (j >= count) continue;
                if (s->use_dot)
                    x[j] = (vf)((*(const viu *)(from[j] + 4 * d) & splat_bits(s->keep)) ^
                                splat_bits(s->flip));
                else x[j] = load_floats(from[j], d, s->dtype) * splat(s->scale);
            }
            transpose(x);
            UNROLL
            for (int j = 0; j < VL; j++) t->queries[(d + j) * NV + v] = x[j];
        }
        for (; d < s->depth; d++) {
            word_t *to = (word_t *)(t->queries + d * NV + v);
            for (int j = 0; j < VL; j++) to[j] = j < count ? query_word(s, from[j], d) : 0;
        }
        t->sums[v] = (vf){0};
        t->maxima[v] = t->limits[v] = splat(-FLT_MAX);
    }
    memset(t->out, 0, VECTOR_BYTES * NV * (size_t)s->dim_v);
}

/* Outputs become rows again; a row that saw nothing is 0 with -inf, and NaN stays NaN. */
static void store_strip(const Shape *s, const Strip *t, char *const *row, float *const *lse) {
    for (int v = 0; v < t->width; v++) {
        char *const *to = row + v * VL;
        int count = t->rows - v * VL < VL ? t->rows - v * VL : VL;
        vf sum = t->sums[v], inverse = (vf)(~(sum == 0) & (vi)(1 / sum));
        int64_t d = 0;
        for (; d + VL <= s->dim_v; d += VL) {
            vf x[VL];
            UNROLL
            for (int j = 0; j < VL; j++) x[j] = t->out[(d + j) * NV + v] * inverse;
            transpose(x);
            UNROLL
            for (int j = 0; j < VL; j++)
                if (j < count) store_floats(to[j], d, x[j], s->dtype);
        }
        for (; d < s->dim_v; d++) {
            vf x = t->out[d * NV + v] * inverse;
            for (int j = 0; j < count; j++) store_element(to[j], d, x[j], s->dtype);
        }
        for (int j = 0; lse && j < count; j++)
            *lse[v * VL + j] = sum[j] == 0 ? -INFINITY : (t->maxima[v][j] + log2f(sum[j])) * LN2;
    }
}

/* A mask of floats in the scale of exp2. The lowest finite value must not become -inf: a row of it is
 * a plain mean. */
INLINE vf scale_bias(vf raw) {
    vf scaled = raw * splat(LOG2E), lowest = splat(-2e38f);
    vi is_low = (scaled < lowest) & (raw > splat(-INFINITY));
    return (vf)((is_low & (vi)lowest) | (~is_low & (vi)scaled));
}

/* ---- keys and values --------------------------------------------------------------------------- */

INLINE void copy_row(const char *from, int64_t count, float *to, const int dtype) {
    int64_t d = 0;
    for (; d + VL <= count; d += VL) *(vfu *)(to + d) = load_floats(from, d, dtype);
    for (; d < count; d++) to[d] = load_element(from, d, dtype);
}

INLINE void copy_rows(const char **row, int count, int64_t dim, char *to, int dtype) {
    for (int i = 0; i < count; i++, to += 4 * dim) {
        if (dtype == FLOAT16) copy_row(row[i], dim, (float *)to, FLOAT16);
        else copy_row(row[i], dim, (float *)to, BFLOAT16);
        row[i] = to;
    }
}

/* Rows that the arithmetic can't read become copies that it can. */
static void prepare_rows(const Shape *s, Work *w, Rows *rows) {
    w->paired = NULL;
    if (s->copies_values) copy_rows(rows->value, rows->count, s->dim_v, w->values, s->dtype);
    if (!s->copies_keys) return;
    if (!s->use_dot) {
        copy_rows(rows->key, rows->count, s->dim, w->keys, s->dtype);
        return;
    }
    for (int i = 0; i < rows->count; i++) { /* an odd last element gets a partner of 0 */
        char *to = w->keys + i * s->depth * 4;
        memcpy(to, rows->key[i], (size_t)(2 * s->dim));
        memset(to + 2 * s->dim, 0, 2);
        rows->key[i] = to;
    }
}

/* Values of two keys share a word, as the products of pairs want them. */
static void pair_values(const Shape *s, const Work *w, const Rows *rows) {
    for (int i = 0; i < rows->count; i += 2) {
        const uint16_t *a = (const uint16_t *)rows->value[i], *b = NULL;
        if (i + 1 < rows->count) b = (const uint16_t *)rows->value[i + 1];
        uint32_t *to = w->pairs + i / 2 * s->dim_v;
        int64_t d = 0;
        for (; b && d + VL <= s->dim_v; d += VL)
            *(viu *)(to + d) = __builtin_convertvector(*(const vhu *)(a + d), vi) |
                               __builtin_convertvector(*(const vhu *)(b + d), vi) << 16;
        for (; d < s->dim_v; d++) to[d] = a[d] | (uint32_t)(b ? b[d] : 0) << 16;
    }
}

/* Rows that are needed soon are fetched a few at a time while others are computed: they lie anywhere,
 * so that the hardware does not see the next one coming. */
typedef struct {
    int lists;
    struct {
        const char *const *row;
        int count;
        int64_t bytes;
    } list[4];
} Ahead;

INLINE void plan_ahead(Ahead *ahead, const char *const *row, int count, int64_t bytes) {
    if (!count) return;
    ahead->list[ahead->lists].row = row;
    ahead->list[ahead->lists].count = count;
    ahead->list[ahead->lists++].bytes = bytes;
}

INLINE void plan_rows_ahead(const Shape *s, Ahead *ahead, const Rows *rows) {
    plan_ahead(ahead, rows->key, rows->count, s->dim * element_size(s->dtype));
    plan_ahead(ahead, rows->value, rows->count, s->dim_v * element_size(s->dtype));
}

/* The part `share` of `shares`. */
INLINE void fetch_ahead(const Ahead *ahead, int share, int shares) {
    for (int n = 0; n < ahead->lists; n++) {
        int count = ahead->list[n].count, each = count / shares + 1, end = (share + 1) * each;
        for (int i = share * each; i < (end < count ? end : count); i++)
            for (int64_t at = 0; at < ahead->list[n].bytes; at += 64)
                __builtin_prefetch(ahead->list[n].row[i] + at, 0, 2);
    }
}
