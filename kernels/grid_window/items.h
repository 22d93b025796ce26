/* What a work item is made of: its rows, its keys KEYS at a time, and which of them each row sees. */

#pragma once

#include "../block_sparse/tiles.h"

/* Mirrored by ctypes in native.py. Axes are ordered slowest first; strides count elements,
 * and those of the last axis are 1. */
typedef struct {
    const void *query, *key, *value;
    void *out;
    float *lse;          /* [B, H, S] contiguous, or NULL */
    const uint8_t *seen; /* key mask, 0 where hidden, or NULL */
    const float *bias;   /* added to the scores of a key, or NULL */
    int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
    int64_t mask_stride[3];      /* of seen or bias: batch, head, token */
    const int32_t *queries[3];   /* position of a query slot, [num_tiles, tile] */
    const int32_t *keys[3];      /* position of a key slot, [num_tiles, span] */
    const int32_t *low[3];       /* first key slot that a query slot sees, [num_tiles, tile] */
    const int32_t *high[3];      /* one past the last */
    const int32_t *num_queries[3], *num_keys[3]; /* used slots, [num_tiles] */
    const int32_t *axis[3];      /* position of a coordinate, [length] */
    const int32_t *special;      /* positions of the tokens outside of the grid */
    int32_t masked[3];           /* whether low and high matter */
    int32_t num_tiles[3], tile[3], span[3], length[3];
    int32_t num_special, seq_len, batch, heads, kv_heads, dim, dim_v;
    int32_t rows_per_item; /* of one head */
    int32_t dtype, threads;
    float scale;
    int64_t *pairs; /* where to count the query-key pairs that were computed, or NULL */
} WindowCall;

typedef struct {
    const WindowCall *call;
    Shape shape;
    int strips; /* of the rows of one head */
    int32_t items_per_tile, special_items, items;
    _Atomic int32_t next;
    _Atomic int64_t pairs;
} WindowJob;

typedef struct {
    int32_t tile[3], batch, kv_head, first, rows; /* first: query slot of the tile */
    int is_special;
    int32_t extent[3];
    int64_t num_keys;
    const char *key, *value; /* of the head */
} WindowItem;

/* Rows of an item. */
typedef struct {
    int32_t *position; /* [rows] */
    int32_t *slot[3];
} WindowRows;

/* Keys of an item, KEYS at a time. */
typedef struct {
    Rows rows;
    int32_t position[KEYS];
    int32_t slot[3][KEYS]; /* per axis; -1 for special tokens */
} WindowKeys;

/* What one thread works in. */
typedef struct {
    char *base;
    Work work;
    Strip *strips; /* [heads of a key head, strips] */
    WindowRows rows, next_rows;
    uint64_t *words[3];         /* lanes of a strip that see a key slot of an axis, [strips, span] */
    const char **query, **next_query; /* [heads of a key head, rows] */
    char **out;
    WindowItem next;  /* what it will likely work on next */
    WindowKeys first; /* of that */
    int64_t pairs;
} WindowScratch;

/* ---- what an item works on -------------------------------------------------------------------- */

static int locate_window(const WindowJob *w, int32_t index, WindowItem *item) {
    const WindowCall *c = w->call;
    memset(item, 0, sizeof *item);
    int32_t per_item = c->rows_per_item, heads = c->batch * c->kv_heads;
    int64_t total;
    item->is_special = index < w->special_items * heads; /* they see most: first in line */
    if (item->is_special) {
        item->first = index % w->special_items * per_item;
        index /= w->special_items;
        total = c->num_special;
        for (int a = 0; a < 3; a++) item->extent[a] = c->length[a];
    } else {
        index -= w->special_items * heads;
        item->first = index % w->items_per_tile * per_item;
        index /= w->items_per_tile;
        total = 1;
        for (int a = 2; a >= 0; a--) {
            item->tile[a] = index % c->num_tiles[a];
            index /= c->num_tiles[a];
            item->extent[a] = c->num_keys[a][item->tile[a]];
            total *= c->num_queries[a][item->tile[a]];
        }
    }
    item->kv_head = index % c->kv_heads;
    item->batch = index / c->kv_heads;
    item->rows = (int32_t)(total - item->first < per_item ? total - item->first : per_item);
    item->num_keys = (int64_t)item->extent[0] * item->extent[1] * item->extent[2];
    int64_t size = element_size(c->dtype), b = item->batch, h = item->kv_head;
    item->key = (const char *)c->key + (b * c->k_stride[0] + h * c->k_stride[1]) * size;
    item->value = (const char *)c->value + (b * c->v_stride[0] + h * c->v_stride[1]) * size;
    return item->rows > 0;
}

static void find_rows(const WindowCall *c, const WindowItem *item, WindowRows *rows) {
    if (item->is_special) {
        memcpy(rows->position, c->special + item->first, 4 * (size_t)item->rows);
        return;
    }
    const int32_t *axis[3];
    int32_t extent[3], slot[3];
    for (int a = 0; a < 3; a++) {
        axis[a] = c->queries[a] + (int64_t)item->tile[a] * c->tile[a];
        extent[a] = c->num_queries[a][item->tile[a]];
    }
    slot[2] = item->first % extent[2];
    slot[1] = item->first / extent[2] % extent[1];
    slot[0] = item->first / extent[2] / extent[1];
    for (int32_t i = 0; i < item->rows; i++) {
        rows->position[i] = axis[0][slot[0]] + axis[1][slot[1]] + axis[2][slot[2]];
        for (int a = 0; a < 3; a++) rows->slot[a][i] = slot[a];
        for (int a = 2; ++slot[a] == extent[a] && a; a--) slot[a] = 0;
    }
}

/* For every strip and every axis that hides something, the lanes that see each key slot. */
static void find_words(const WindowJob *w, const WindowItem *item, WindowScratch *s) {
    const WindowCall *c = w->call;
    for (int a = 0; a < 3 && !item->is_special; a++) {
        if (!c->masked[a]) continue;
        const int32_t *low = c->low[a] + (int64_t)item->tile[a] * c->tile[a];
        const int32_t *high = c->high[a] + (int64_t)item->tile[a] * c->tile[a];
        for (int n = 0; n * LANES < item->rows; n++) {
            const int32_t *slot = s->rows.slot[a] + n * LANES;
            uint64_t *words = s->words[a] + (int64_t)n * c->span[a];
            int rows = item->rows - n * LANES < LANES ? item->rows - n * LANES : LANES;
            memset(words, 0, 8 * (size_t)item->extent[a]);
            for (int r = 0, end; r < rows; r = end) { /* rows of one slot see the same */
                for (end = r + 1; end < rows && slot[end] == slot[r];) end++;
                uint64_t lanes = lanes_of(end - r) << r;
                for (int32_t k = low[slot[r]]; k < high[slot[r]]; k++) words[k] |= lanes;
            }
        }
    }
}

/* The keys from `first` on; special tokens come last. */
static void find_keys(const WindowCall *c, const WindowItem *item, int64_t first, WindowKeys *keys) {
    int64_t size = element_size(c->dtype), k_row = c->k_stride[2] * size, v_row = c->v_stride[2] * size;
    int64_t left = item->num_keys + c->num_special - first;
    int count = left <= 0 ? 0 : left < KEYS ? (int)left : KEYS, i = 0;
    const int32_t *axis[3], *extent = item->extent;
    for (int a = 0; a < 3; a++)
        axis[a] = item->is_special ? c->axis[a] : c->keys[a] + (int64_t)item->tile[a] * c->span[a];
    int64_t row = first < item->num_keys ? first / extent[2] : 0;
    int32_t x = first < item->num_keys ? (int32_t)(first % extent[2]) : 0;
    for (; i < count && first + i < item->num_keys; row++, x = 0) {
        int32_t t = (int32_t)(row / extent[1]), y = (int32_t)(row % extent[1]);
        int32_t at = axis[0][t] + axis[1][y];
        for (; x < extent[2] && i < count; x++, i++) {
            keys->position[i] = at + axis[2][x];
            keys->slot[0][i] = t;
            keys->slot[1][i] = y;
            keys->slot[2][i] = x;
        }
    }
    for (; i < count; i++) {
        keys->position[i] = c->special[first + i - item->num_keys];
        for (int a = 0; a < 3; a++) keys->slot[a][i] = -1;
    }
    for (i = 0; i < count; i++) {
        keys->rows.key[i] = item->key + keys->position[i] * k_row;
        keys->rows.value[i] = item->value + keys->position[i] * v_row;
    }
    keys->rows.count = count;
}

/* The lanes of a strip that see each key. */
static void see_keys(const WindowJob *w, const WindowItem *item, const WindowScratch *s, int strip,
                     const WindowKeys *keys, uint64_t *seen) {
    const WindowCall *c = w->call;
    int rows = item->rows - strip * LANES < LANES ? item->rows - strip * LANES : LANES;
    int count = keys->rows.count;
    for (int i = 0; i < count; i++) seen[i] = lanes_of(rows);
    for (int a = 0; a < 3 && !item->is_special; a++) {
        if (!c->masked[a]) continue;
        const uint64_t *words = s->words[a] + (int64_t)strip * c->span[a];
        const int32_t *slot = keys->slot[a];
        for (int i = 0; i < count; i++) seen[i] &= slot[i] < 0 ? ~(uint64_t)0 : words[slot[i]];
    }
}
