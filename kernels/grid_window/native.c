/* Attention in windows of a token grid on a CPU, tokens addressed in place.
 *
 * The arithmetic is that of block_sparse. Here the rows and keys of a tile are products of three short
 * axis tables: a work item takes some rows of a tile, in strips, and walks the keys of the tile KEYS
 * at a time; a strip leaves out the keys that none of its rows sees. Nothing is permuted or gathered.
 */

#include "items.h"

/* ---- one work item: some rows of a tile, all query heads of one key head ---------------------- */

/* Rows of a tensor with query heads, [heads of a key head, rows]. */
static void find_head_rows(const WindowCall *c, const WindowItem *item, const WindowRows *rows,
                           const void *base, const int64_t stride[3], const char **row) {
    int64_t size = element_size(c->dtype), group = c->heads / c->kv_heads;
    for (int64_t h = 0; h < group; h++) {
        int64_t head = item->batch * stride[0] + (item->kv_head * group + h) * stride[1];
        for (int32_t r = 0; r < item->rows; r++)
            row[h * c->rows_per_item + r] =
                (const char *)base + (head + rows->position[r] * stride[2]) * size;
    }
}

INLINE int window_rows_from(const WindowItem *item, int first) {
    return item->rows - first < LANES ? item->rows - first : LANES;
}

static void save_rows(const WindowJob *w, const WindowItem *item, const WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t group = c->heads / c->kv_heads;
    float *lse_of[LANES];
    for (int64_t h = 0; h < group; h++) {
        int64_t head = item->batch * c->heads + item->kv_head * group + h;
        for (int first = 0; first < item->rows; first += LANES) {
            for (int r = 0; c->lse && r < window_rows_from(item, first); r++)
                lse_of[r] = c->lse + head * c->seq_len + s->rows.position[first + r];
            store_strip(&w->shape, &s->strips[h * w->strips + first / LANES],
                        s->out + h * c->rows_per_item + first, c->lse ? lse_of : NULL);
        }
    }
}

static void load_key_bias(const float *bias, const int64_t stride, const int32_t *position, int count,
                          vf *to) {
    for (int i = 0; i < count + MR; i++) { /* keys that fill a tile have one too */
        vf scaled = scale_bias(splat(i < count ? bias[position[i] * stride] : 0));
        for (int v = 0; v < NV; v++) to[i * NV + v] = scaled;
    }
}

/* One strip over some keys, without those that none of its rows sees. */
static void attend_window(const WindowJob *w, const WindowItem *item, WindowScratch *s, int64_t head,
                          int n, WindowKeys *keys, const Ahead *ahead) {
    const WindowCall *c = w->call;
    Strip *t = &s->strips[head * w->strips + n];
    int64_t mask = item->batch * c->mask_stride[0] +
                   (item->kv_head * (c->heads / c->kv_heads) + head) * c->mask_stride[1];
    int is_cut = c->seen != NULL;
    for (int a = 0; a < 3 && !item->is_special; a++) is_cut |= c->masked[a];
    Run run;
    Rows some;
    int32_t position[KEYS];
    run.rows = &keys->rows;
    run.masked = is_cut;
    if (is_cut) {
        uint64_t seen[KEYS];
        see_keys(w, item, s, n, keys, seen);
        if (c->seen)
            for (int i = 0; i < keys->rows.count; i++)
                if (!c->seen[mask + keys->position[i] * c->mask_stride[2]]) seen[i] = 0;
        run.rows = &some;
        some.count = 0;
        for (int i = 0; i < keys->rows.count; i++) { /* without branches: half of them may be hidden */
            run.seen[some.count] = seen[i];
            position[some.count] = keys->position[i];
            some.key[some.count] = keys->rows.key[i];
            some.value[some.count] = keys->rows.value[i];
            some.count += seen[i] != 0;
        }
    }
    if (c->bias)
        load_key_bias(c->bias + mask, c->mask_stride[2],
                      is_cut ? position : keys->position, run.rows->count, s->work.bias);
    s->pairs += (int64_t)run.rows->count * t->rows;
    attend_run(&w->shape, t, &s->work, &run, ahead);
}

/* What a strip fetches while it meets the last keys of its item: its outputs, and what comes next. */
static void plan_next_window(const WindowJob *w, const WindowItem *item, const WindowScratch *s,
                           int64_t head, int first, Ahead *ahead) {
    const WindowCall *c = w->call;
    int64_t size = element_size(c->dtype), at = head * c->rows_per_item + first;
    plan_ahead(ahead, (const char *const *)s->out + at, window_rows_from(item, first), c->dim_v * size);
    if (first < s->next.rows)
        plan_ahead(ahead, s->next_query + at, window_rows_from(&s->next, first), c->dim * size);
    if (head == c->heads / c->kv_heads - 1 && first + LANES >= item->rows)
        plan_rows_ahead(&w->shape, ahead, &s->first.rows);
}

static void attend_window_item(const WindowJob *w, const WindowItem *item, WindowScratch *s,
                               int32_t likely) {
    const WindowCall *c = w->call;
    int64_t group = c->heads / c->kv_heads, total = item->num_keys + c->num_special;
    WindowKeys keys[2];
    find_rows(c, item, &s->rows);
    find_words(w, item, s);
    find_keys(c, item, 0, &keys[0]);
    find_head_rows(c, item, &s->rows, c->query, c->q_stride, s->query);
    find_head_rows(c, item, &s->rows, c->out, c->o_stride, (const char **)s->out);
    for (int64_t h = 0; h < group; h++)
        for (int first = 0; first < item->rows; first += LANES)
            load_strip(&w->shape, &s->strips[h * w->strips + first / LANES],
                       s->query + h * c->rows_per_item + first, window_rows_from(item, first));
    s->next.rows = s->first.rows.count = 0;
    if (likely < w->items && locate_window(w, likely, &s->next)) {
        find_rows(c, &s->next, &s->next_rows);
        find_keys(c, &s->next, 0, &s->first);
        find_head_rows(c, &s->next, &s->next_rows, c->query, c->q_stride, s->next_query);
    }
    for (int64_t key = 0, n = 0; key < total; key += KEYS, n = !n) {
        const Rows *next = &keys[!n].rows;
        find_keys(c, item, key + KEYS, &keys[!n]);
        prepare_rows(&w->shape, &s->work, &keys[n].rows);
        for (int64_t h = 0; h < group; h++)
            for (int first = 0; first < item->rows; first += LANES) {
                Ahead ahead = {.lists = 0};
                if (!next->count) plan_next_window(w, item, s, h, first, &ahead);
                else if (h == group - 1 && first + LANES >= item->rows)
                    plan_rows_ahead(&w->shape, &ahead, next);
                attend_window(w, item, s, h, first / LANES, &keys[n], &ahead);
            }
    }
    save_rows(w, item, s);
}

/* ---- threads ---------------------------------------------------------------------------------- */

static int open_window_scratch(const WindowJob *w, WindowScratch *s) {
    const WindowCall *c = w->call;
    const Shape *shape = &w->shape;
    size_t rows = (size_t)c->rows_per_item, strips = (size_t)w->strips;
    size_t group = (size_t)(c->heads / c->kv_heads);
    size_t bytes = work_bytes(shape) + group * strips * strip_bytes(shape) + 8 * padded(4 * rows);
    bytes += padded(group * strips * sizeof(Strip)) + 3 * padded(group * rows * sizeof(char *));
    for (int a = 0; a < 3; a++) bytes += padded(8 * strips * (size_t)c->span[a]);
    char *at = s->base = allocate(bytes);
    if (!at) return 0;
    s->work = work_at(shape, take(&at, work_bytes(shape)));
    s->strips = take(&at, group * strips * sizeof(Strip));
    for (size_t i = 0; i < group * strips; i++)
        s->strips[i] = strip_at(shape, take(&at, strip_bytes(shape)));
    s->rows.position = take(&at, 4 * rows);
    s->next_rows.position = take(&at, 4 * rows);
    for (int a = 0; a < 3; a++) {
        s->rows.slot[a] = take(&at, 4 * rows);
        s->next_rows.slot[a] = take(&at, 4 * rows);
        s->words[a] = take(&at, 8 * strips * (size_t)c->span[a]);
    }
    s->query = take(&at, group * rows * sizeof(char *));
    s->next_query = take(&at, group * rows * sizeof(char *));
    s->out = take(&at, group * rows * sizeof(char *));
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
        if (!locate_window(w, index, &item)) continue;
        attend_window_item(w, &item, &s, atomic_load_explicit(&w->next, memory_order_relaxed));
    }
    atomic_fetch_add(&w->pairs, s.pairs);
    free(s.base);
    return NULL;
}

static void plan_windows(WindowJob *w, const WindowCall *c) {
    memset(w, 0, sizeof *w);
    w->call = c;
    w->shape = shape_of(c->dtype, c->dim, c->dim_v, c->scale, c->bias != NULL);
    w->strips = (c->rows_per_item + LANES - 1) / LANES;
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
