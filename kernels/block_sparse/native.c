/* Block-sparse attention on a CPU: one source for AVX-512, AVX2, NEON and anything else.
 *
 * Plain C ABI, no headers of PyTorch, so that a system compiler builds it in about a second. A work
 * item is some rows of a query block, in strips; it walks the keys of its list KEYS at a time.
 */

#include "lists.h"

#define MAX_STRIPS (MAX_ROWS / LANES)

/* What one thread works in. */
typedef struct {
    char *base;
    Strip strips[MAX_STRIPS];
    Work work;
    Item next; /* what it will likely work on next */
    Batch first; /* of that */
    const char *query[MAX_ROWS], *next_query[MAX_ROWS];
    char *out[MAX_ROWS];
} Scratch;

/* ---- one work item: some rows of a query block ------------------------------------------------ */

static int locate_item(const Job *job, int64_t index, Item *item) {
    const Call *c = job->call;
    int64_t size = element_size(c->dtype), per_head = job->num_q * job->chunks_per_block;
    item->b = index / per_head / c->heads;
    item->h = index / per_head % c->heads;
    item->block = index % per_head / job->chunks_per_block;
    int64_t first = item->block * c->block_q, end = first + c->block_q, kv = c->heads / c->kv_heads;
    item->row = first + index % job->chunks_per_block * job->rows_per_item;
    if (end > item->row + job->rows_per_item) end = item->row + job->rows_per_item;
    if (end > c->len_q) end = c->len_q;
    item->rows = end - item->row;
    int64_t k = item->b * c->k_stride[0] + item->h / kv * c->k_stride[1];
    int64_t v = item->b * c->v_stride[0] + item->h / kv * c->v_stride[1];
    item->key = (const char *)c->key + k * size;
    item->value = (const char *)c->value + v * size;
    return item->rows > 0;
}

/* Rows of a tensor with query heads. */
static void find_item_rows(const Job *job, const Item *item, const void *base, const int64_t stride[3],
                      const char **row) {
    int64_t size = element_size(job->call->dtype), head = item->b * stride[0] + item->h * stride[1];
    for (int64_t r = 0; r < item->rows; r++)
        row[r] = (const char *)base + (head + (item->row + r) * stride[2]) * size;
}

INLINE int rows_from(const Item *item, int64_t first) {
    return (int)(item->rows - first < LANES ? item->rows - first : LANES);
}

static void store_item(const Job *job, const Item *item, Scratch *s) {
    const Call *c = job->call;
    float *lse = c->lse ? c->lse + (item->b * c->heads + item->h) * c->len_q + item->row : NULL;
    float *lse_of[LANES];
    for (int64_t first = 0; first < item->rows; first += LANES) {
        for (int r = 0; lse && r < rows_from(item, first); r++) lse_of[r] = lse + first + r;
        store_strip(&job->shape, &s->strips[first / LANES], s->out + first, lse ? lse_of : NULL);
    }
}

/* One strip over one batch: keys that none of its rows sees are left out. */
static void attend_batch(const Job *job, const Item *item, Strip *t, int64_t row, Scratch *s,
                         Batch *batch, const Ahead *ahead) {
    uint64_t seen[64];
    Rows some;
    int32_t key[KEYS];
    Run run;
    run.rows = &batch->rows;
    run.masked = find_seen(job, item, row, t->rows, batch, seen);
    if (run.masked) {
        run.rows = &some;
        some.count = 0;
        for (int i = 0; i < batch->rows.count; i++) {
            if (!seen[i]) continue;
            run.seen[some.count] = seen[i];
            key[some.count] = batch->key[i];
            some.key[some.count] = batch->rows.key[i];
            some.value[some.count++] = batch->rows.value[i];
        }
    }
    if (job->shape.biased)
        load_bias(job, item, row, t, run.masked ? key : batch->key, run.rows->count, s->work.bias);
    attend_run(&job->shape, t, &s->work, &run, ahead);
}

/* What a strip fetches while it meets the last keys of its item: its outputs, and what comes next. */
static void plan_next_item(const Job *job, const Item *item, Scratch *s, int64_t first, Ahead *ahead) {
    const Call *c = job->call;
    int64_t size = element_size(c->dtype);
    plan_ahead(ahead, (const char *const *)s->out + first, rows_from(item, first), c->dim_v * size);
    if (first < s->next.rows)
        plan_ahead(ahead, s->next_query + first, rows_from(&s->next, first), c->dim * size);
    if (first + LANES >= item->rows) plan_rows_ahead(&job->shape, ahead, &s->first.rows);
}

static void attend_item(Job *job, Scratch *s, const Item *item, int64_t likely) {
    const Call *c = job->call;
    Walk walk = start_walk(job, item, item->block, item->row + item->rows - 1);
    Batch batches[2];
    next_batch(job, item, &walk, &batches[0]);
    find_item_rows(job, item, c->query, c->q_stride, s->query);
    find_item_rows(job, item, c->out, c->o_stride, (const char **)s->out);
    for (int64_t r = 0; r < item->rows; r += LANES)
        load_strip(&job->shape, &s->strips[r / LANES], s->query + r, rows_from(item, r));
    s->next.rows = s->first.rows.count = 0;
    if (likely < job->items && locate_item(job, likely, &s->next)) {
        Walk other = start_walk(job, &s->next, s->next.block, s->next.row + s->next.rows - 1);
        next_batch(job, &s->next, &other, &s->first);
        find_item_rows(job, &s->next, c->query, c->q_stride, s->next_query);
    }
    for (int n = 0; batches[n].rows.count; n = !n) {
        Batch *next = &batches[!n];
        next_batch(job, item, &walk, next);
        prepare_rows(&job->shape, &s->work, &batches[n].rows);
        for (int64_t r = 0; r < item->rows; r += LANES) {
            Ahead ahead = {.lists = 0};
            if (!next->rows.count) plan_next_item(job, item, s, r, &ahead);
            else if (r + LANES >= item->rows) plan_rows_ahead(&job->shape, &ahead, &next->rows);
            attend_batch(job, item, &s->strips[r / LANES], item->row + r, s, &batches[n], &ahead);
        }
    }
    store_item(job, item, s);
}

/* ---- threads ---------------------------------------------------------------------------------- */

static int open_scratch(const Job *job, Scratch *s) {
    const Shape *shape = &job->shape;
    char *at = s->base = allocate(MAX_STRIPS * strip_bytes(shape) + work_bytes(shape));
    if (!at) return 0;
    for (int i = 0; i < MAX_STRIPS; i++) s->strips[i] = strip_at(shape, take(&at, strip_bytes(shape)));
    s->work = work_at(shape, at);
    return 1;
}

static void *work(void *argument) {
    Job *job = argument;
    Scratch s;
    if (!open_scratch(job, &s)) return NULL;
    for (;;) {
        int64_t index = atomic_fetch_add(&job->next, 1);
        Item item;
        if (index >= job->items) break;
        if (!locate_item(job, index, &item)) continue;
        attend_item(job, &s, &item, atomic_load_explicit(&job->next, memory_order_relaxed));
    }
    free(s.base);
    return NULL;
}

static void plan_job(Job *job, const Call *c) {
    job->call = c;
    job->shape = shape_of(c->dtype, c->dim, c->dim_v, c->scale, c->attn_mask_kind == MASK_FLOAT);
    job->num_q = (c->len_q + c->block_q - 1) / c->block_q;
    job->num_k = (c->len_k + c->block_k - 1) / c->block_k;
    /* fewer rows per item where there would be too few items for the threads */
    int64_t longest = c->block_q < c->len_q ? c->block_q : c->len_q;
    int64_t rows = longest < MAX_ROWS ? longest : MAX_ROWS;
    int64_t blocks = c->batch * c->heads * job->num_q;
    if (!blocks) return;
    while (rows > VL && blocks * ((longest + rows - 1) / rows) < 4 * c->threads && c->threads > 1)
        rows = (rows / 2 + VL - 1) / VL * VL;
    job->rows_per_item = rows;
    job->chunks_per_block = (longest + rows - 1) / rows;
    job->items = blocks * job->chunks_per_block;
}

/* Vector bytes, and whether bfloat16 dot products are used: for reports. */
int retrofit_native_info(void) { return VECTOR_BYTES * 2 + HAS_DOT; }

size_t retrofit_native_call_size(void) { return sizeof(Call); }

/* 0 when done, 1 when memory ran out, 2 if a list names what does not exist. */
int retrofit_block_sparse(const Call *call) {
    Job job;
    memset(&job, 0, sizeof job);
    plan_job(&job, call);
    int threads = call->threads, started = 0;
    if (threads > job.items) threads = (int)job.items;
    pthread_t *handles = calloc((size_t)threads + 1, sizeof(pthread_t));
    if (!handles) return 1;
    /* a thread that can't be started leaves its share to the others */
    while (started < threads - 1 && !pthread_create(&handles[started], NULL, work, &job)) started++;
    work(&job);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
    free(handles);
    return atomic_load(&job.next) < job.items ? 1 : atomic_load(&job.invalid) ? 2 : 0;
}
