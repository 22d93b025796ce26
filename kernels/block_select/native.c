/* Choosing key blocks on a CPU: pools of tokens, and the best entries of each row of scores. */

#include "../block_sparse/vectors.h"

/* Mirrored by ctypes in native.py; strides count elements. */
typedef struct {
    const void *tokens; /* [B, H, S, D] */
    float *pools;       /* [B, H, ceil(S / block), D] contiguous */
    int64_t batch, heads, length, dim, block;
    int64_t stride[4];
    int32_t dtype, is_max, threads;
} PoolCall;

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

INLINE void add_token(float *to, const void *from, int64_t step, int64_t dim, int dtype,
                      int is_max) {
    int64_t d = 0;
    if (step == 1)
        for (; d + VL <= dim; d += VL) {
            vf x = load_floats(from, d, dtype), sum = *(vfu *)(to + d);
            /* a NaN of either stays */
            vi keeps = (sum > x) | (sum != sum);
            *(vfu *)(to + d) = is_max ? (vf)((keeps & (vi)sum) | (~keeps & (vi)x)) : sum + x;
        }
    for (; d < dim; d++) {
        float x = load_element(from, d * step, dtype);
        if (!is_max) to[d] += x;
        else if (!(to[d] > x) && to[d] == to[d]) to[d] = x;
    }
}

/* One block of all heads: tokens of several heads often lie side by side. */
static void pool_item(const void *argument, int64_t item, void *room) {
    const PoolCall *c = argument;
    (void)room;
    int64_t blocks = (c->length + c->block - 1) / c->block, b = item / blocks, n = item % blocks;
    int64_t first = n * c->block, left = c->length - first, dim = c->dim;
    int64_t tokens = left < c->block ? left : c->block, size = c->dtype == FLOAT32 ? 4 : 2;
    float *pools = c->pools + (b * c->heads * blocks + n) * dim;
    const char *from = (const char *)c->tokens + (b * c->stride[0] + first * c->stride[2]) * size;
    for (int64_t h = 0; h < c->heads; h++)
        for (int64_t d = 0; d < dim; d++)
            pools[h * blocks * dim + d] = c->is_max ? -INFINITY : 0;
    int by_token = c->stride[1] < c->stride[2];
    int64_t outer = by_token ? tokens : c->heads, inner = by_token ? c->heads : tokens;
    for (int64_t i = 0; i < outer; i++)
        for (int64_t j = 0; j < inner; j++) {
            int64_t token = by_token ? i : j, h = by_token ? j : i;
            const char *at = from + (token * c->stride[2] + h * c->stride[1]) * size;
            float *to = pools + h * blocks * dim;
            if (c->dtype == FLOAT32) add_token(to, at, c->stride[3], dim, FLOAT32, c->is_max);
            else add_token(to, at, c->stride[3], dim, c->dtype, c->is_max);
        }
    for (int64_t h = 0; h < c->heads && !c->is_max; h++)
        for (int64_t d = 0; d < dim; d++) pools[h * blocks * dim + d] /= (float)tokens;
}

int retrofit_pool(const PoolCall *call) {
    Loop loop = {.call = call, .run = pool_item};
    loop.items = call->batch * ((call->length + call->block - 1) / call->block);
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

static void select_item(const void *argument, int64_t item, void *room) {
    const SelectCall *c = argument;
    int64_t head = item / c->rows, columns = c->columns, count = c->fewest[head];
    const float *scores = c->scores + item * columns;
    uint8_t *kept = c->kept + item * columns;
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
    loop.room = 2 * sizeof(Entry) * (size_t)call->columns;
    return run_parallel(&loop, call->threads);
}

size_t retrofit_select_sizes(int which) { return which ? sizeof(SelectCall) : sizeof(PoolCall); }
