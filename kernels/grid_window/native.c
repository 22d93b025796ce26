/* Attention in windows of a token grid on a CPU, tokens addressed in place.
 *
 * The arithmetic is that of block_sparse. Here the rows and keys of a tile are products of three short
 * axis tables: a work item takes some rows of a tile, in strips, and walks the keys of the tile KEYS
 * at a time; a strip leaves out the keys that none of its rows sees. Nothing is permuted or gathered.
 */

#include "items.h"

/* ---- one work item: some rows of a tile, all query heads of one key head ---------------------- */

static void load_rows(const WindowJob *w, const WindowItem *item, WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t size = element_size(c->dtype), group = c->heads / c->kv_heads;
    const char *row[LANES];
    for (int64_t h = 0; h < group; h++) {
        const char *q = (const char *)c->query +
            (item->batch * c->q_stride[0] + (item->kv_head * group + h) * c->q_stride[1]) * size;
        for (int32_t first = 0; first < item->rows; first += LANES) {
            int rows = item->rows - first < LANES ? item->rows - first : LANES;
            for (int r = 0; r < rows; r++)
                row[r] = q + s->row_position[first + r] * c->q_stride[2] * size;
            load_strip(&w->shape, &s->strips[h * w->strips + first / LANES], row, rows);
        }
    }
}

static void save_rows(const WindowJob *w, const WindowItem *item, const WindowScratch *s) {
    const WindowCall *c = w->call;
    int64_t size = element_size(c->dtype), group = c->heads / c->kv_heads;
    char *row[LANES];
    float *lse_of[LANES];
    for (int64_t h = 0; h < group; h++) {
        int64_t head = item->kv_head * group + h;
        char *out = (char *)c->out + (item->batch * c->o_stride[0] + head * c->o_stride[1]) * size;
        float *lse = c->lse ? c->lse + (item->batch * c->heads + head) * c->seq_len : NULL;
        for (int32_t first = 0; first < item->rows; first += LANES) {
            const Strip *t = &s->strips[h * w->strips + first / LANES];
            for (int r = 0; r < t->rows; r++) {
                int32_t position = s->row_position[first + r];
                row[r] = out + position * c->o_stride[2] * size;
                if (lse) lse_of[r] = lse + position;
            }
            store_strip(&w->shape, t, row, lse ? lse_of : NULL);
        }
    }
}

static void load_key_bias(const float *bias, const int64_t stride, const int32_t *position, int count,
                          vf *to) {
    for (int i = 0; i < count + MR; i++) { /* keys that fill a tile have one too */
        float raw = i < count ? bias[position[i] * stride] : 0, scaled = raw * LOG2E;
        /* the lowest finite value must not become -inf: a row of it is a plain mean */
        if (scaled < -2e38f && raw > -INFINITY) scaled = -2e38f;
        for (int v = 0; v < NV; v++) to[i * NV + v] = splat(scaled);
    }
}

/* One strip over some keys, without those that none of its rows sees. */
static void attend_window(const WindowJob *w, const WindowItem *item, WindowScratch *s, int64_t head,
                          int n, WindowKeys *keys, const Rows *ahead) {
    const WindowCall *c = w->call;
    Strip *t = &s->strips[head * w->strips + n];
    int64_t mask = item->batch * c->mask_stride[0] +
                   (item->kv_head * (c->heads / c->kv_heads) + head) * c->mask_stride[1];
    uint64_t all = lanes_of(t->rows);
    const uint64_t *words[3];
    int num_words = 0, axis[3];
    for (int a = 0; a < 3; a++)
        if (c->masked[a] && !item->is_special) {
            axis[num_words] = a;
            words[num_words++] = s->words[a] + (int64_t)n * c->span[a];
        }
    Run run;
    Rows some;
    int32_t position[KEYS];
    run.rows = &keys->rows;
    run.masked = 0;
    if (num_words || c->seen) {
        run.rows = &some;
        some.count = 0;
        for (int i = 0; i < keys->rows.count; i++) {
            uint64_t seen = all;
            for (int a = 0; a < num_words && keys->slot[0][i] >= 0; a++)
                seen &= words[a][keys->slot[axis[a]][i]];
            if (!seen || (c->seen && !c->seen[mask + keys->position[i] * c->mask_stride[2]])) continue;
            run.masked |= seen != all;
            run.seen[some.count] = seen;
            position[some.count] = keys->position[i];
            some.key[some.count] = keys->rows.key[i];
            some.value[some.count++] = keys->rows.value[i];
        }
    }
    if (c->bias)
        load_key_bias(c->bias + mask, c->mask_stride[2],
                      run.rows == &some ? position : keys->position, run.rows->count, s->work.bias);
    s->pairs += (int64_t)run.rows->count * t->rows;
    attend_run(&w->shape, t, &s->work, &run, ahead);
}

static void attend_window_item(const WindowJob *w, const WindowItem *item, WindowScratch *s) {
    static const Rows nothing;
    const WindowCall *c = w->call;
    int64_t group = c->heads / c->kv_heads, total = item->num_keys + c->num_special;
    int strips = (item->rows + LANES - 1) / LANES;
    WindowKeys keys[2];
    find_rows(c, item, s);
    find_words(w, item, s);
    find_keys(c, item, 0, &keys[0]);
    load_rows(w, item, s);
    for (int64_t first = 0, n = 0; first < total; first += KEYS, n = !n) {
        find_keys(c, item, first + KEYS, &keys[!n]);
        prepare_rows(&w->shape, &s->work, &keys[n].rows);
        for (int64_t h = 0; h < group; h++)
            for (int i = 0; i < strips; i++) {
                int is_last = h == group - 1 && i == strips - 1;
                attend_window(w, item, s, h, i, &keys[n], is_last ? &keys[!n].rows : &nothing);
            }
    }
    save_rows(w, item, s);
}

/* ---- threads ---------------------------------------------------------------------------------- */

static int open_window_scratch(const WindowJob *w, WindowScratch *s) {
    const WindowCall *c = w->call;
    const Shape *shape = &w->shape;
    size_t rows = (size_t)c->rows_per_item, strips = (size_t)w->strips;
    size_t all_strips = strips * (size_t)(c->heads / c->kv_heads);
    size_t bytes = work_bytes(shape) + all_strips * (strip_bytes(shape)) + 4 * padded(4 * rows);
    bytes += padded(all_strips * sizeof(Strip));
    for (int a = 0; a < 3; a++) bytes += padded(8 * strips * (size_t)c->span[a]);
    char *at = s->base = allocate(bytes);
    if (!at) return 0;
    s->work = work_at(shape, take(&at, work_bytes(shape)));
    s->strips = take(&at, all_strips * sizeof(Strip));
    for (size_t i = 0; i < all_strips; i++)
        s->strips[i] = strip_at(shape, take(&at, strip_bytes(shape)));
    s->row_position = take(&at, 4 * rows);
    for (int a = 0; a < 3; a++) {
        s->row_slot[a] = take(&at, 4 * rows);
        s->words[a] = take(&at, 8 * strips * (size_t)c->span[a]);
    }
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
        if (locate_window(w, index, &item)) attend_window_item(w, &item, &s);
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
