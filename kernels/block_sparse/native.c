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

#include "tiles.h"

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
            if (job->sign == 1 && step == 1) /* a call of memcpy would cost more than the copy */
                for (; d + VL <= c->dim; d += VL)
                    *(vhu *)(to + d) = *(const vhu *)((const uint16_t *)src + d);
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
        float sum = sum_lanes(*(const vf *)(s->sums + r * VL));
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

/* A share of what comes next is fetched while a tile is computed: panels lie anywhere in the head, so
 * the hardware does not see the next one coming. */
static void prefetch_panels(const Tile *t, const PanelRef *panels, int count, int64_t share,
                            int64_t shares) {
    int64_t from = count * share / shares, to = count * (share + 1) / shares;
    for (int64_t n = from; n < to; n++) {
        prefetch_rows(t->keys + panels[n].panel * t->job->k_panel_bytes, 1, 0, t->job->k_panel_bytes, 0);
        prefetch_rows(values_of(t, panels[n].panel), 1, 0, t->job->v_panel_bytes, 0);
    }
}

/* The first panels of the query block that follows; its rows are likely this thread's. */
static int panels_ahead(const Job *job, int64_t b, int64_t h, int64_t block, PanelRef *to) {
    const Call *c = job->call;
    int64_t at = b * c->list_stride[0] + h * c->list_stride[1] + block * c->list_stride[2];
    if (block >= job->num_q) return 0;
    const uint8_t *kept = c->block_mask ? c->block_mask + at : NULL;
    int64_t entries = kept ? job->num_k : c->counts[at / c->list_width];
    int count = 0;
    for (int64_t n = 0; n < entries && (kept || n < c->list_width); n++) {
        int64_t k = kept ? n : c->indices[at + n];
        if (kept && !kept[n]) continue;
        if (k < 0 || k >= job->num_k) break;
        for (int64_t i = 0; i < job->panels_per_block; i++) {
            if (count == GROUP_PANELS) return count;
            to[count++].panel = (int32_t)(k * job->panels_per_block + i);
        }
    }
    return count;
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
    const char *q = (const char *)c->query + (b * c->q_stride[0] + h * c->q_stride[1]) * size;
    char *out = (char *)c->out + (b * c->o_stride[0] + h * c->o_stride[1]) * size;
    int64_t q_row = c->q_stride[2] * size, out_row = c->o_stride[2] * size;
    load_queries(job, s, q + row * q_row, rows);
    memset(s->out, 0, sizeof(float) * (size_t)(rows * width));
    memset(s->sums, 0, sizeof(float) * (size_t)(rows * VL));
    for (int64_t r = 0; r < rows; r++) s->maxima[r] = s->limits[r] = -FLT_MAX;
    int64_t count = list_panels(job, s, b, h, block, end - 1);
    if (count < 0) {
        atomic_store(&job->invalid, 1);
        return;
    }
    Tile t = {.job = job, .keys = slot_of(job, group), .s = s, .b = b, .h = h, .first_row = first};
    t.values = job->in_place ? head_values(job, group) : packed_values(job, group);
    t.last_values = job->in_place ? packed_values(job, group) : NULL;
    int64_t tiles = (rows + MR - 1) / MR;
    PanelRef ahead[GROUP_PANELS];
    int num_ahead = end == first + c->block_q ? panels_ahead(job, b, h, block + 1, ahead) : 0;
    for (int64_t n = 0; n < count; n += GROUP_PANELS) {
        int group_size = (int)(count - n < GROUP_PANELS ? count - n : GROUP_PANELS);
        int64_t left = count - n - group_size;
        const PanelRef *next = left ? s->panels + n + group_size : ahead;
        int next_size = (int)(left > GROUP_PANELS ? GROUP_PANELS : left ? left : num_ahead);
        for (int64_t i = 0; i < tiles; i++) {
            int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles; /* even tiles */
            prefetch_panels(&t, next, next_size, i, tiles);
            if (!left) {
                int64_t later = c->len_q - end - from < to - from ? c->len_q - end - from : to - from;
                prefetch_rows(q + (end + from) * q_row, later, q_row, c->dim * size, 0);
                prefetch_rows(out + (row + from) * out_row, to - from, out_row, c->dim_v * size, 1);
            }
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
    store_rows(job, s, out + row * out_row,
               c->lse ? c->lse + (b * c->heads + h) * c->len_q + row : NULL, rows);
}

/* ---- threads ---------------------------------------------------------------------------------- */

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

/* Whether rows of values already lie as they would be packed. */
static int values_are_panels(const Call *c) {
    uint64_t any = (uint64_t)(uintptr_t)c->value;
    for (int i = 0; i < 2; i++) any |= (uint64_t)(c->v_stride[i] * 4);
    return c->dtype == FLOAT32 && c->v_stride[3] == 1 && c->v_stride[2] == c->dim_v &&
           c->dim_v % VL == 0 && c->block_k % VL == 0 && any % VECTOR_BYTES == 0;
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
    job->in_place = values_are_panels(c);
    job->last_panel = c->len_k % VL ? c->len_k / VL : -1;
    job->slot_bytes = job->num_panels * job->k_panel_bytes;
    job->slot_bytes += (job->in_place ? 1 : job->num_panels) * job->v_panel_bytes;
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
