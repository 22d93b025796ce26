/* Choosing key blocks on a CPU: pools of tokens, and the best entries of each row of scores. */

#include "../block_sparse/vectors.h"

#define POOL_VECTORS 4 /* vectors of channels that are summed in registers */
#define POOL_TOKENS 16 /* tokens of one head before the next head */
#define SCORE_ROWS 64  /* rows of scores that share a transposed copy of the keys */

/* Mirrored by ctypes in native.py; strides count elements. */
typedef struct {
    const void *tokens; /* [B, H, S, D] */
    float *pools;       /* [B, H, ceil(S / block), D] contiguous */
    int64_t batch, heads, length, dim, block;
    int64_t stride[4];
    int32_t dtype, is_max, threads;
} PoolCall;

typedef struct {
    const float *queries; /* pools, [groups, rows, dim] contiguous */
    const float *keys;    /* pools, [groups, columns, dim] contiguous */
    float *scores;        /* [groups, rows, columns] contiguous */
    int64_t groups, rows, columns, dim;
    int32_t threads;
    float scale;
} ScoreCall;

typedef struct {
    const float *scores; /* [heads, rows, columns] contiguous */
    uint8_t *kept;       /* the same, 0 or 1 */
    const int64_t *fewest; /* entries that are kept whatever the mass, [heads] */
    const float *mass;     /* limits of the cumulated mass, [heads], or NULL */
    int64_t heads, rows, columns;
    /* how far the mass goes: 0 while it is at most the limit with this entry; without it, 1 while it
     * is below, 2 while it is at most the limit */
    int32_t rule, threads;
} SelectCall;

typedef struct {
    const void *call;
    int64_t items;
    void (*run)(const void *call, int64_t item, void *room);
    size_t room;
    _Atomic int64_t next;
} Loop;

static void *run_loop(void *argument) {
    Loop *loop = argument;
    void *room = loop->room ? allocate(loop->room) : NULL;
    if (loop->room && !room) return NULL;
    for (int64_t item; (item = atomic_fetch_add(&loop->next, 1)) < loop->items;)
        loop->run(loop->call, item, room);
    free(room);
    return NULL;
}

/* 0 when done, 1 when memory ran out. */
static int run_parallel(Loop *loop, int threads) {
    int started = 0;
    if (threads > loop->items) threads = (int)loop->items;
    pthread_t *handles = calloc((size_t)threads + 1, sizeof(pthread_t));
    if (!handles) return 1;
    /* a thread that can't be started leaves its share to the others */
    while (started < threads - 1 && !pthread_create(&handles[started], NULL, run_loop, loop))
        started++;
    run_loop(loop);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
    free(handles);
    return atomic_load(&loop->next) < loop->items;
}

/* ---- pools ------------------------------------------------------------------------------------ */

/* Add tokens that are `row` bytes apart; `width` vectors of channels from `d` on stay in registers. */
INLINE void add_channels(float *to, const char *from, int64_t row, int64_t tokens, int64_t d,
                         const int width, int dtype, int is_max) {
    vf sum[POOL_VECTORS];
    UNROLL
    for (int i = 0; i < width; i++) sum[i] = *(vfu *)(to + d + i * VL);
    for (int64_t t = 0; t < tokens; t++, from += row) {
        UNROLL
        for (int i = 0; i < width; i++) {
            vf x = load_floats(from, d + i * VL, dtype);
            /* a NaN of either stays */
            vi keeps = (sum[i] > x) | (sum[i] != sum[i]);
            sum[i] = is_max ? (vf)((keeps & (vi)sum[i]) | (~keeps & (vi)x)) : sum[i] + x;
        }
    }
    UNROLL
    for (int i = 0; i < width; i++) *(vfu *)(to + d + i * VL) = sum[i];
}

INLINE void add_tokens(float *to, const char *from, int64_t row, int64_t step, int64_t tokens,
                       int64_t dim, int dtype, int is_max) {
    int64_t d = 0;
    if (step == 1) {
        for (; d + POOL_VECTORS * VL <= dim; d += POOL_VECTORS * VL)
            add_channels(to, from, row, tokens, d, POOL_VECTORS, dtype, is_max);
        for (; d + VL <= dim; d += VL) add_channels(to, from, row, tokens, d, 1, dtype, is_max);
    }
    for (; d < dim; d++)
        for (int64_t t = 0; t < tokens; t++) {
            float x = load_element(from + t * row, d * step, dtype);
            if (!is_max) to[d] += x;
            else if (!(to[d] > x) && to[d] == to[d]) to[d] = x;
        }
}

/* One block of all heads: tokens of several heads often lie side by side, so some tokens of all heads
 * are added before the next ones. */
static void pool_item(const void *argument, int64_t item, void *room) {
    const PoolCall *c = argument;
    (void)room;
    int64_t blocks = (c->length + c->block - 1) / c->block, b = item / blocks, n = item % blocks;
    int64_t first = n * c->block, end = first + c->block < c->length ? first + c->block : c->length;
    int64_t size = c->dtype == FLOAT32 ? 4 : 2, row = c->stride[2] * size, dim = c->dim;
    float *pools = c->pools + (b * c->heads * blocks + n) * dim;
    const char *tokens = (const char *)c->tokens + b * c->stride[0] * size;
    for (int64_t h = 0; h < c->heads; h++)
        for (int64_t d = 0; d < dim; d++)
            pools[h * blocks * dim + d] = c->is_max ? -INFINITY : 0;
    for (int64_t token = first; token < end; token += POOL_TOKENS)
        for (int64_t h = 0; h < c->heads; h++) {
            int64_t count = end - token < POOL_TOKENS ? end - token : POOL_TOKENS;
            const char *from = tokens + h * c->stride[1] * size + token * row;
            float *to = pools + h * blocks * dim;
            if (c->dtype == FLOAT32)
                add_tokens(to, from, row, c->stride[3], count, dim, FLOAT32, c->is_max);
            else add_tokens(to, from, row, c->stride[3], count, dim, c->dtype, c->is_max);
        }
    for (int64_t h = 0; h < c->heads && !c->is_max; h++)
        for (int64_t d = 0; d < dim; d++) pools[h * blocks * dim + d] /= (float)(end - first);
}

int retrofit_pool(const PoolCall *call) {
    Loop loop = {.call = call, .run = pool_item};
    loop.items = call->batch * ((call->length + call->block - 1) / call->block);
    return run_parallel(&loop, call->threads);
}

/* ---- scores ----------------------------------------------------------------------------------- */

INLINE int64_t whole_vectors(int64_t count) { return (count + VL - 1) / VL * VL; }

/* Keys become columns, `width` of them; those beyond `columns` are 0. */
static void turn_keys(const float *keys, float *to, int64_t columns, int64_t dim, int64_t width) {
    for (int64_t j = 0; j < width; j += VL) {
        int64_t d = 0;
        for (; j + VL <= columns && d + VL <= dim; d += VL) {
            vf x[VL];
            UNROLL
            for (int i = 0; i < VL; i++) x[i] = *(const vfu *)(keys + (j + i) * dim + d);
            transpose(x);
            UNROLL
            for (int i = 0; i < VL; i++) *(vf *)(to + (d + i) * width + j) = x[i];
        }
        for (; d < dim; d++)
            for (int64_t i = j; i < j + VL; i++)
                to[d * width + i] = i < columns ? keys[i * dim + d] : 0;
    }
}

/* Products of one query with `count` vectors of keys, in the scale of exp2. */
INLINE void multiply(const float *query, const float *keys, float *line, int64_t dim, int64_t width,
                     float factor, const int count) {
    vf acc[POOL_VECTORS] = {0};
    for (int64_t d = 0; d < dim; d++)
        UNROLL
        for (int i = 0; i < count; i++)
            acc[i] += splat(query[d]) * *(const vf *)(keys + d * width + i * VL);
    UNROLL
    for (int i = 0; i < count; i++) *(vf *)(line + i * VL) = acc[i] * splat(factor);
}

static void softmax_line(float *line, float *to, int64_t columns, int64_t width) {
    for (int64_t j = columns; j < width; j++) line[j] = -INFINITY;
    vf best = *(vf *)line, total = {0};
    for (int64_t j = VL; j < width; j += VL) best = vmax(*(vf *)(line + j), best);
    float top = best[0], sum = 0;
    for (int i = 1; i < VL; i++) top = best[i] > top ? best[i] : top;
    for (int64_t j = 0; j < width; j += VL) {
        vf p = vexp2(*(vf *)(line + j) - splat(top), 0);
        *(vf *)(line + j) = p;
        total += p;
    }
    for (int i = 0; i < VL; i++) sum += total[i];
    for (int64_t j = 0; j < width; j += VL) *(vf *)(line + j) /= splat(sum);
    memcpy(to, line, sizeof(float) * (size_t)columns);
}

static void score_item(const void *argument, int64_t item, void *room) {
    const ScoreCall *c = argument;
    int64_t chunks = (c->rows + SCORE_ROWS - 1) / SCORE_ROWS, group = item / chunks;
    int64_t first = item % chunks * SCORE_ROWS, width = whole_vectors(c->columns);
    int64_t end = first + SCORE_ROWS < c->rows ? first + SCORE_ROWS : c->rows;
    float *keys = room, *line = keys + c->dim * width, factor = c->scale * LOG2E;
    turn_keys(c->keys + group * c->columns * c->dim, keys, c->columns, c->dim, width);
    for (int64_t row = group * c->rows + first; row < group * c->rows + end; row++) {
        const float *query = c->queries + row * c->dim;
        int64_t j = 0;
        for (; j + POOL_VECTORS * VL <= width; j += POOL_VECTORS * VL)
            multiply(query, keys + j, line + j, c->dim, width, factor, POOL_VECTORS);
        for (; j < width; j += VL) multiply(query, keys + j, line + j, c->dim, width, factor, 1);
        softmax_line(line, c->scores + row * c->columns, c->columns, width);
    }
}

int retrofit_score(const ScoreCall *call) {
    Loop loop = {.call = call, .run = score_item};
    loop.items = call->groups * ((call->rows + SCORE_ROWS - 1) / SCORE_ROWS);
    loop.room = sizeof(float) * (size_t)((call->dim + 1) * whole_vectors(call->columns));
    return run_parallel(&loop, call->threads);
}

/* ---- selection -------------------------------------------------------------------------------- */

typedef struct {
    uint32_t key, column; /* ascending keys are descending scores; NaN comes first */
} Entry;

INLINE uint32_t descending_key(float score) {
    uint32_t bits;
    if (score != score) return 0;
    score += 0.0f; /* -0 equals 0 */
    memcpy(&bits, &score, 4);
    return ~(bits >> 31 ? ~bits : bits | 0x80000000);
}

/* Stable radix sort, a byte at a time; bytes that all keys share cost one look. */
static Entry *sort_entries(Entry *from, Entry *to, int64_t count) {
    uint32_t all = ~(uint32_t)0, any = 0;
    for (int64_t i = 0; i < count; i++) {
        all &= from[i].key;
        any |= from[i].key;
    }
    for (int shift = 0; shift < 32; shift += 8) {
        if (!((all ^ any) >> shift & 0xff)) continue;
        int32_t place[257] = {0};
        for (int64_t i = 0; i < count; i++) place[(from[i].key >> shift & 0xff) + 1]++;
        for (int i = 0; i < 256; i++) place[i + 1] += place[i];
        for (int64_t i = 0; i < count; i++) to[place[from[i].key >> shift & 0xff]++] = from[i];
        Entry *done = to;
        to = from;
        from = done;
    }
    return from;
}

static int64_t count_mass(const float *scores, const Entry *sorted, int64_t columns, float limit,
                          int rule) {
    double sum = 0; /* as PyTorch's cumulative sum, rounded to float for each comparison */
    int64_t n = 0;
    for (; n < columns; n++) {
        float before = (float)sum;
        sum += scores[sorted[n].column];
        if (rule == 0 ? !((float)sum <= limit) : rule == 1 ? !(before < limit) : !(before <= limit))
            break;
    }
    return n;
}

typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));

INLINE vf to_scores(const float *scores, int64_t left) {
    vf x = {0};
    if (left >= VL) return *(const vfu *)scores;
    for (int64_t i = 0; i < left; i++) x[i] = scores[i];
    return x;
}

/* `descending_key` of a vector. */
INLINE vu descending_keys(vf score) {
    vi nan = score != score, bits = (vi)(score + 0.0f), negative = bits >> 31;
    return (vu)(~(bits ^ (negative | (vi)splat(-0.0f))) & ~nan);
}

INLINE int64_t count_lanes(vi mask) {
#if VECTOR_BYTES == 64
    return __builtin_popcount(_mm512_test_epi32_mask((__m512i)mask, (__m512i)mask));
#elif VECTOR_BYTES == 32
    return __builtin_popcount((unsigned)_mm256_movemask_ps((__m256)mask));
#else
    return -(int64_t)(mask[0] + mask[1] + mask[2] + mask[3]);
#endif
}

INLINE int64_t count_below(const vu *keys, int64_t vectors, uint32_t limit) {
    int64_t count = 0;
    for (int64_t i = 0; i < vectors; i++) count += count_lanes((vi)(keys[i] < limit - (vu){0}));
    return count;
}

/* The best `count` entries without sorting: the key of the last one, found bit by bit. */
static void keep_best(const float *scores, uint8_t *kept, vu *keys, int64_t columns,
                      int64_t count) {
    int64_t vectors = (columns + VL - 1) / VL;
    const uint32_t *key = (const uint32_t *)keys;
    for (int64_t i = 0; i < vectors; i++)
        keys[i] = descending_keys(to_scores(scores + i * VL, columns - i * VL));
    for (int64_t i = columns; i < vectors * VL; i++) ((uint32_t *)keys)[i] = UINT32_MAX;
    uint32_t last = 0; /* the largest key that fewer than `count` entries are below */
    for (uint32_t bit = (uint32_t)1 << 31; bit; bit >>= 1)
        if (count_below(keys, vectors, last | bit) < count) last |= bit;
    int64_t equal = count - count_below(keys, vectors, last); /* of those, the first ones */
    for (int64_t i = 0; i < columns; i++) {
        int takes = key[i] == last && equal > 0;
        equal -= takes;
        kept[i] = (uint8_t)(key[i] < last || takes);
    }
}

static void select_item(const void *argument, int64_t item, void *room) {
    const SelectCall *c = argument;
    int64_t head = item / c->rows, columns = c->columns, count = c->fewest[head];
    const float *scores = c->scores + item * columns;
    uint8_t *kept = c->kept + item * columns;
    if (!c->mass && count > 0 && count < columns) {
        keep_best(scores, kept, room, columns, count);
        return;
    }
    Entry *entries = room;
    for (int64_t i = 0; i < columns; i++)
        entries[i] = (Entry){descending_key(scores[i]), (uint32_t)i};
    Entry *sorted = sort_entries(entries, entries + columns, columns);
    if (c->mass) {
        int64_t needed = count_mass(scores, sorted, columns, c->mass[head], c->rule);
        if (needed > count) count = needed;
    }
    for (int64_t i = 0; i < columns; i++) kept[i] = 0;
    for (int64_t i = 0; i < count && i < columns; i++) kept[sorted[i].column] = 1;
}

int retrofit_select(const SelectCall *call) {
    Loop loop = {.call = call, .run = select_item, .items = call->heads * call->rows};
    loop.room = 2 * sizeof(Entry) * (size_t)(call->columns + VL);
    return run_parallel(&loop, call->threads);
}

size_t retrofit_select_sizes(int which) {
    return which == 0 ? sizeof(PoolCall) : which == 1 ? sizeof(ScoreCall) : sizeof(SelectCall);
}
