/* Attention in windows of a token grid on a CPU, tokens addressed in place.
 *
 * The arithmetic is that of block_sparse/native.c. Here the rows and keys of a tile are products of
 * three short axis tables: a work item takes some rows of a tile, packs the keys of the tile GROUP at
 * a time, and runs tiles of MR rows over the panels that one of them sees. Nothing is permuted or
 * gathered outside of a thread's scratch memory.
 */

#include "items.h"

/* ---- one group of keys ------------------------------------------------------------------------ */

/* How many positions follow one another. */
INLINE int32_t count_run(const int32_t *position, int32_t count) {
    int32_t run = 1;
    while (run < count && position[run] == position[run - 1] + 1) run++;
    return run;
}

INLINE void copy_row(char *to, const char *from, int64_t bytes) {
    int64_t i = 0;
    for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) *(vf *)(to + i) = *(const vfu *)(from + i);
    memcpy(to + i, from + i, (size_t)(bytes - i));
}

/* Keys that follow one another are packed where they are, others by way of a copy. */
static void pack_group(const WindowJob *w, const KeyGroup *g, const char *k, const char *v,
                       WindowScratch *s) {
    const WindowCall *c = w->call;
    const Job *job = &w->job;
    int64_t size = size_of(&w->gathered), k_row = c->k_stride[2] * size, v_row = c->v_stride[2] * size;
    int64_t k_bytes = padded((size_t)(c->dim * size)), v_bytes = padded((size_t)(c->dim_v * size));
    for (int p = 0; p < g->panels; p++) {
        const int32_t *position = g->position + p * VL;
        int rows = g->count - p * VL < VL ? g->count - p * VL : VL;
        char *to_k = s->keys + p * job->k_panel_bytes, *to_v = s->values + p * job->v_panel_bytes;
        for (int i = (p + PACK_AHEAD / VL) * VL; i < (p + 1 + PACK_AHEAD / VL) * VL && i < g->count; i++) {
            prefetch_rows(k + g->position[i] * k_row, 1, 0, c->dim * size, 0);
            prefetch_rows(v + g->position[i] * v_row, 1, 0, c->dim_v * size, 0);
        }
        if (count_run(position, rows) == rows) {
            pack_keys(&w->in_place_job, k + position[0] * k_row, rows, to_k);
            pack_values(&w->in_place_job, v + position[0] * v_row, rows, to_v);
            continue;
        }
        for (int i = 0; i < rows; i++) {
            copy_row(s->copied_k + i * k_bytes, k + position[i] * k_row, c->dim * size);
            copy_row(s->copied_v + i * v_bytes, v + position[i] * v_row, c->dim_v * size);
        }
        pack_keys(job, s->copied_k, rows, to_k);
        pack_values(job, s->copied_v, rows, to_v);
    }
}

/* A share of the next group's keys is fetched while each tile of this group is computed: they lie
 * rows or frames apart, where the hardware does not look. */
static void prefetch_keys(const WindowJob *w, const KeyGroup *next, const char *k, const char *v,
                          int64_t share, int64_t shares) {
    const WindowCall *c = w->call;
    int64_t size = size_of(&w->gathered), k_row = c->k_stride[2] * size, v_row = c->v_stride[2] * size;
    for (int64_t i = next->count * share / shares; i < next->count * (share + 1) / shares; i++) {
        const char *key = k + next->position[i] * k_row, *value = v + next->position[i] * v_row;
        for (int64_t n = 0; n < c->dim * size; n += 64) __builtin_prefetch(key + n, 0, 2);
        for (int64_t n = 0; n < c->dim_v * size; n += 64) __builtin_prefetch(value + n, 0, 2);
    }
}

/* Output rows of a tile, fetched before they are written. */
static void prefetch_out(const WindowJob *w, const WindowItem *item, const WindowScratch *s,
                         int64_t head, int64_t from, int64_t to) {
    const WindowCall *c = w->call;
    int64_t size = size_of(&w->gathered);
    char *out = (char *)c->out + (item->batch * c->o_stride[0] + head * c->o_stride[1]) * size;
    for (int64_t i = from; i < to; i++)
        prefetch_rows(out + s->row_position[i] * c->o_stride[2] * size, 1, 0, c->dim_v * size, 1);
}

static void run_window_strip(Tile *t, Strip *strip, const float *bias) {
    if (!strip->count) return;
    for (int v = strip->count; v < NV; v++) {
        strip->panel[v] = strip->panel[0];
        strip->masked = 1; /* their bits are 0 */
    }
    strip->biased = bias != NULL;
    for (int r = 0; bias && r < t->rows; r++)
        for (int v = 0; v < NV; v++)
            memcpy(t->s->bias + (r * NV + v) * VL, bias + strip->panel[v] * VL, VECTOR_BYTES);
#if HAS_DOT
    if (t->job->use_dot) strip_dot(t, strip);
    else strip_float(t, strip);
#else
    strip_float(t, strip);
#endif
    strip->count = 0;
}

/* A tile of rows over a group of which every row sees all. */
static int attend_whole_group(Tile *t, const KeyGroup *g) {
    Strip strip = {0};
    for (int p = 0; p < g->panels; p++) {
        strip.panel[strip.count++] = p;
        if (strip.count == NV) run_window_strip(t, &strip, NULL);
    }
    if (strip.count)
        for (int r = 0; r < t->rows; r++) strip.visible[r] = ((uint64_t)1 << strip.count * VL) - 1;
    run_window_strip(t, &strip, NULL);
    flush(t, t->job->use_dot);
    return g->panels;
}

/* A tile of rows over the panels of a group that one of its rows sees. */
static int attend_window_group(Tile *t, const KeyGroup *g, uint64_t word[MR][WORDS],
                               const float *bias) {
    Strip strip = {0};
    int visited = 0;
    for (int p = 0; p < g->panels; p++) {
        int at = p * VL / 64, shift = p * VL % 64, to = strip.count * VL;
        uint32_t any = 0, all = ALL_LANES;
        for (int r = 0; r < t->rows; r++) {
            uint32_t lanes = (uint32_t)(word[r][at] >> shift) & ALL_LANES;
            any |= lanes;
            all &= lanes;
        }
        if (any) {
            if (!strip.count) {
                strip.masked = 0;
                memset(strip.visible, 0, sizeof strip.visible);
            }
            strip.masked |= all != ALL_LANES;
            for (int r = 0; r < t->rows; r++)
                strip.visible[r] |= (word[r][at] >> shift & ALL_LANES) << to;
            strip.panel[strip.count++] = p;
            visited++;
        }
        if (strip.count == NV) run_window_strip(t, &strip, bias);
    }
    run_window_strip(t, &strip, bias);
    flush(t, t->job->use_dot);
    return visited;
}

static void row_words(const WindowCall *c, const WindowItem *item, const WindowScratch *s,
                      const KeyGroup *g, int64_t row, int rows, uint64_t word[MR][WORDS]) {
    for (int r = 0; r < rows; r++) {
        memcpy(word[r], g->visible, sizeof g->visible);
        for (int a = 0; a < 3 && !item->is_special; a++) {
            if (!c->masked[a]) continue;
            const uint64_t *sees = s->words[a] + s->row_slot[a][row + r] * WORDS;
            for (int n = 0; n < WORDS; n++) word[r][n] &= sees[n];
        }
    }
}

/* ---- one work item: some rows of a tile, all query heads of one key head ---------------------- */

/* The rows of one query head within the scratch of an item. */
INLINE Scratch rows_of(const WindowJob *w, const Scratch *s, int64_t row) {
    Scratch part = *s;
    part.q += row * w->job.depth;
    part.out += row * w->job.vectors_v * VL;
    part.sums += row * VL;
    part.maxima += row;
    part.limits += row;
    return part;
}

static void load_rows(const WindowJob *w, const WindowItem *item, WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t size = size_of(&w->gathered), group = c->heads / c->kv_heads;
    int64_t total = group * item->rows;
    for (int64_t h = 0; h < group; h++) {
        int64_t head = item->kv_head * group + h;
        const char *q = (const char *)c->query +
                        (item->batch * c->q_stride[0] + head * c->q_stride[1]) * size;
        for (int32_t i = 0, run; i < item->rows; i += run) {
            Scratch rows = rows_of(w, &s->s, h * item->rows + i);
            run = count_run(s->row_position + i, item->rows - i);
            load_queries(&w->in_place_job, &rows, q + s->row_position[i] * c->q_stride[2] * size,
                         run);
        }
    }
    for (int64_t n = 0; n < total; n++) s->s.maxima[n] = s->s.limits[n] = -FLT_MAX;
    memset(s->s.out, 0, sizeof(float) * (size_t)(total * w->job.vectors_v * VL));
    memset(s->s.sums, 0, sizeof(float) * (size_t)(total * VL));
}

static void save_rows(const WindowJob *w, const WindowItem *item, const WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t size = size_of(&w->gathered), group = c->heads / c->kv_heads;
    for (int64_t h = 0; h < group; h++) {
        int64_t head = item->kv_head * group + h;
        char *out =
            (char *)c->out + (item->batch * c->o_stride[0] + head * c->o_stride[1]) * size;
        float *lse = c->lse ? c->lse + (item->batch * c->heads + head) * c->seq_len : NULL;
        for (int32_t i = 0, run; i < item->rows; i += run) {
            Scratch rows = rows_of(w, &s->s, h * item->rows + i);
            int64_t position = s->row_position[i];
            run = count_run(s->row_position + i, item->rows - i);
            store_rows(&w->in_place_job, &rows, out + position * c->o_stride[2] * size,
                       lse ? lse + position : NULL, run);
        }
    }
}

static const char *head_of(const WindowJob *w, const WindowItem *item, const void *base,
                           const int64_t *stride) {
    return (const char *)base +
           (item->batch * stride[0] + item->kv_head * stride[1]) * size_of(&w->gathered);
}

static void attend_window_item(const WindowJob *w, WindowItem *item, WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t group = c->heads / c->kv_heads, total = item->num_keys + c->num_special;
    const char *k = head_of(w, item, c->key, c->k_stride);
    const char *v = head_of(w, item, c->value, c->v_stride);
    find_rows(c, item, s);
    load_rows(w, item, s);
    Tile t = {.job = &w->job, .keys = s->keys, .values = s->values, .s = &s->s};
    int64_t tiles = (item->rows + MR - 1) / MR;
    KeyGroup groups[2];
    find_keys(c, item, 0, &groups[0]);
    for (int64_t n = 0; n * GROUP < total; n++) {
        KeyGroup *g = &groups[n % 2], *next = &groups[(n + 1) % 2];
        next->count = 0;
        if ((n + 1) * GROUP < total) find_keys(c, item, (n + 1) * GROUP, next);
        if (!find_words(c, item, g, s)) continue;
        int is_last = (n + 1) * GROUP >= total;
        pack_group(w, g, k, v, s);
        for (int64_t h = 0; h < group; h++) {
            if (!h || c->mask_stride[1]) mask_keys(c, item, (int32_t)(item->kv_head * group + h), g);
            for (int64_t i = 0; i < tiles; i++) {
                int64_t from = item->rows * i / tiles, to = item->rows * (i + 1) / tiles;
                if (!h) prefetch_keys(w, next, k, v, i, tiles);
                if (is_last) prefetch_out(w, item, s, item->kv_head * group + h, from, to);
                Scratch part = rows_of(w, &s->s, h * item->rows + from);
                t.rows = (int)(to - from);
                t.q = part.q;
                t.out = part.out;
                t.sums = part.sums;
                t.maxima = part.maxima;
                t.limits = part.limits;
                int panels;
                if (g->is_whole) {
                    panels = attend_whole_group(&t, g);
                } else {
                    uint64_t word[MR][WORDS];
                    row_words(c, item, s, g, from, t.rows, word);
                    panels = attend_window_group(&t, g, word, c->bias ? g->bias : NULL);
                }
                s->pairs += panels * t.rows * VL;
            }
        }
    }
    save_rows(w, item, s);
}

/* ---- threads ---------------------------------------------------------------------------------- */

static int open_window_scratch(const WindowJob *w, WindowScratch *s) {
    const WindowCall *c = w->call;
    const Job *job = &w->job;
    int32_t longest = 0;
    for (int a = 0; a < 3; a++) longest = c->span[a] > longest ? c->span[a] : longest;
    size_t item = (size_t)c->rows_per_item, rows = item * (size_t)(c->heads / c->kv_heads);
    struct { void **field; size_t bytes; } parts[] = {
        {(void **)&s->s.q, 4 * rows * (size_t)job->depth},
        {(void **)&s->s.out, 4 * rows * (size_t)job->vectors_v * VL},
        {(void **)&s->s.weights, 4 * MR * GROUP + 2 * VECTOR_BYTES * NV},
        {(void **)&s->s.sums, 4 * rows * VL},
        {(void **)&s->s.maxima, 4 * rows},
        {(void **)&s->s.limits, 4 * rows},
        {(void **)&s->s.bias, 4 * MR * NV * VL},
        {(void **)&s->keys, (size_t)job->k_panel_bytes * GROUP_PANELS},
        {(void **)&s->values, (size_t)job->v_panel_bytes * GROUP_PANELS},
        {(void **)&s->copied_k, VL * padded(4 * (size_t)c->dim)},
        {(void **)&s->copied_v, VL * padded(4 * (size_t)c->dim_v)},
        {(void **)&s->row_position, 4 * item},
        {(void **)&s->row_slot[0], 4 * item},
        {(void **)&s->row_slot[1], 4 * item},
        {(void **)&s->row_slot[2], 4 * item},
        {(void **)&s->words[0], 8 * WORDS * (size_t)c->tile[0]},
        {(void **)&s->words[1], 8 * WORDS * (size_t)c->tile[1]},
        {(void **)&s->words[2], 8 * WORDS * (size_t)c->tile[2]},
        {(void **)&s->before, 8 * WORDS * (size_t)(longest + 1)},
    };
    size_t total = 0, count = sizeof parts / sizeof *parts;
    for (size_t i = 0; i < count; i++) total += padded(parts[i].bytes);
    char *at = s->base = allocate(total);
    if (!at) return 0;
    for (size_t i = 0; i < count; at += padded(parts[i++].bytes)) *parts[i].field = at;
    s->pairs = 0;
    return 1;
}

static void *work_on_windows(void *argument) {
    WindowJob *w = argument;
    WindowScratch s;
    if (!open_window_scratch(w, &s)) return NULL;
    for (;;) {
        int32_t index = atomic_fetch_add(&w->next, 1);
        WindowItem item;
        if (index >= w->items) break;
        if (locate_item(w, index, &item)) attend_window_item(w, &item, &s);
    }
    atomic_fetch_add(&w->pairs, s.pairs);
    free(s.base);
    return NULL;
}

static void plan_windows(WindowJob *w, const WindowCall *c) {
    memset(w, 0, sizeof *w);
    w->call = c;
    Call *call = &w->in_place;
    int64_t size = c->dtype == FLOAT32 ? 4 : 2;
    call->dim = c->dim;
    call->dim_v = c->dim_v;
    call->dtype = c->dtype;
    call->k_stride[2] = c->k_stride[2];
    call->v_stride[2] = c->v_stride[2];
    for (int i = 2; i < 4; i++) {
        call->q_stride[i] = c->q_stride[i];
        call->o_stride[i] = c->o_stride[i];
    }
    call->k_stride[3] = call->v_stride[3] = 1;
    w->gathered = *call;
    w->gathered.k_stride[2] = (int64_t)padded((size_t)(c->dim * size)) / size;
    w->gathered.v_stride[2] = (int64_t)padded((size_t)(c->dim_v * size)) / size;
    Job *job = &w->job;
    job->call = &w->gathered;
    job->use_dot = HAS_DOT && c->dtype == BFLOAT16;
    job->depth = job->use_dot ? (c->dim + 1) / 2 : c->dim;
    job->vectors_v = (c->dim_v + VL - 1) / VL;
    job->k_panel_bytes = job->depth * VECTOR_BYTES;
    job->v_panel_bytes = job->vectors_v * VECTOR_BYTES * (job->use_dot ? VL / 2 : VL);
    job->sign = c->scale < 0 ? -1.0f : c->scale > 0 ? 1.0f : 0.0f;
    job->factor = c->scale == 0 ? 1.0f : fabsf(c->scale) * LOG2E;
    w->in_place_job = *job;
    w->in_place_job.call = &w->in_place;
    int64_t rows = (int64_t)c->tile[0] * c->tile[1] * c->tile[2];
    int64_t tiles = (int64_t)c->num_tiles[0] * c->num_tiles[1] * c->num_tiles[2];
    w->items_per_tile = (int32_t)((rows + c->rows_per_item - 1) / c->rows_per_item);
    w->special_items = (c->num_special + c->rows_per_item - 1) / c->rows_per_item;
    w->items = (int32_t)((w->special_items + tiles * w->items_per_tile) * c->batch * c->kv_heads);
}

size_t retrofit_window_call_size(void) { return sizeof(WindowCall); }

/* 0 when done, 1 when memory ran out. */
int retrofit_grid_window(const WindowCall *c) {
    WindowJob w;
    plan_windows(&w, c);
    int started = 0, threads = c->threads < w.items ? c->threads : w.items;
    pthread_t *handles = calloc((size_t)threads + 1, sizeof(pthread_t));
    if (!handles) return 1;
    /* a thread that can't be started leaves its share to the others */
    while (started < threads - 1 && !pthread_create(&handles[started], NULL, work_on_windows, &w))
        started++;
    work_on_windows(&w);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
    free(handles);
    if (c->pairs) *c->pairs = atomic_load(&w.pairs);
    return atomic_load(&w.next) < w.items;
}
