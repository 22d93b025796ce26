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
    item->key = (const char *)c->key + (item->b * c->k_stride[0] + item->h / kv * c->k_stride[1]) * size;
    item->value =
        (const char *)c->value + (item->b * c->v_stride[0] + item->h / kv * c->v_stride[1]) * size;
    return item->rows > 0;
}

static void load_item(const Job *job, const Item *item, Scratch *s) {
    const Call *c = job->call;
    int64_t size = element_size(c->dtype);
    const char *from = (const char *)c->query +
        (item->b * c->q_stride[0] + item->h * c->q_stride[1] + item->row * c->q_stride[2]) * size;
    const char *row[LANES];
    for (int64_t first = 0; first < item->rows; first += LANES) {
        int rows = (int)(item->rows - first < LANES ? item->rows - first : LANES);
        for (int r = 0; r < rows; r++) row[r] = from + (first + r) * c->q_stride[2] * size;
        load_strip(&job->shape, &s->strips[first / LANES], row, rows);
    }
}

static void store_item(const Job *job, const Item *item, Scratch *s) {
    const Call *c = job->call;
    int64_t size = element_size(c->dtype);
    char *to = (char *)c->out +
        (item->b * c->o_stride[0] + item->h * c->o_stride[1] + item->row * c->o_stride[2]) * size;
    float *lse = c->lse ? c->lse + (item->b * c->heads + item->h) * c->len_q + item->row : NULL;
    char *row[LANES];
    float *lse_of[LANES];
    for (int64_t first = 0; first < item->rows; first += LANES) {
        Strip *t = &s->strips[first / LANES];
        for (int r = 0; r < t->rows; r++) {
            row[r] = to + (first + r) * c->o_stride[2] * size;
            if (lse) lse_of[r] = lse + first + r;
        }
        store_strip(&job->shape, t, row, lse ? lse_of : NULL);
    }
}

/* One strip over one batch: keys that none of its rows sees are left out. */
static void attend_batch(const Job *job, const Item *item, Strip *t, int64_t row, Scratch *s,
                         Batch *batch, const Rows *ahead) {
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

static void attend_item(Job *job, Scratch *s, const Item *item) {
    static const Rows nothing;
    const Call *c = job->call;
    int64_t last_row = item->row + item->rows - 1;
    Walk walk = start_walk(job, item, item->block, last_row);
    Batch batches[2], beyond;
    next_batch(job, item, &walk, &batches[0]);
    load_item(job, item, s);
    for (int n = 0; batches[n].rows.count; n = !n) {
        Batch *batch = &batches[n], *next = &batches[!n];
        next_batch(job, item, &walk, next);
        const Rows *ahead = &next->rows;
        if (!ahead->count && item->block + 1 < job->num_q) { /* likely this thread's too */
            Walk other = start_walk(job, item, item->block + 1, last_row + c->block_q);
            next_batch(job, item, &other, &beyond);
            ahead = &beyond.rows;
        }
        prepare_rows(&job->shape, &s->work, &batch->rows);
        for (int64_t r = 0; r < item->rows; r += LANES)
            attend_batch(job, item, &s->strips[r / LANES], item->row + r, s, batch,
                         r + LANES < item->rows ? &nothing : ahead);
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
        if (locate_item(job, index, &item)) attend_item(job, &s, &item);
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
    int64_t rows = c->block_q < MAX_ROWS ? c->block_q : MAX_ROWS;
    int64_t blocks = c->batch * c->heads * job->num_q;
    while (rows > VL && blocks * ((c->block_q + rows - 1) / rows) < 4 * c->threads && c->threads > 1)
        rows = (rows / 2 + VL - 1) / VL * VL;
    job->rows_per_item = rows;
    job->chunks_per_block = (c->block_q + rows - 1) / rows;
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
