/* What a work item is made of: its rows, its keys group by group, and which of them each row sees. */

#pragma once

#include "../block_sparse/native.c"

/* Mirrored by ctypes in native.py. Axes are ordered slowest first; strides count elements. */
typedef struct {
    const void *query, *key, *value;
    void *out;
    float *lse;          /* [B, H, S] contiguous, or NULL */
    const uint8_t *seen; /* key mask, 0 where hidden, or NULL */
    const float *bias;   /* added to the scores of a key, or NULL */
    int64_t q_stride[4], k_stride[4], v_stride[4], o_stride[4];
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
    /* what the arithmetic needs to know, with the strides of copied keys and of keys in place */
    Call gathered, in_place;
    Job job, in_place_job;
    int32_t items_per_tile, special_items, items;
    _Atomic int32_t next;
    _Atomic int64_t pairs;
} WindowJob;

#define WORDS (GROUP / 64)

typedef struct {
    Scratch s;
    char *base, *keys, *values, *copied_k, *copied_v;
    int32_t *row_position;
    int32_t *row_slot[3];
    uint64_t *words[3]; /* which keys of the group a query slot sees, [tile, WORDS] */
    uint64_t *before;   /* [longest span + 1, WORDS] */
    int64_t pairs;
} WindowScratch;

typedef struct {
    int32_t tile[3], batch, kv_head, first, rows; /* first: query slot of the tile */
    int is_special;
    int32_t extent[3];
    int32_t first_slot[3], last_slot[3]; /* query slots of the rows, per axis */
    int64_t num_keys;
} WindowItem;

/* Keys of a group. */
typedef struct {
    int count, panels;
    int is_whole; /* every row of the item sees all lanes of all panels */
    int32_t position[GROUP];
    int32_t slot[3][GROUP]; /* per axis; -1 for special tokens */
    uint64_t visible[WORDS]; /* keys that exist and that the key mask of the head lets through */
    float bias[GROUP] __attribute__((aligned(64)));
} KeyGroup;

/* ---- what an item works on -------------------------------------------------------------------- */

static int locate_item(const WindowJob *w, int32_t index, WindowItem *item) {
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
    return item->rows > 0;
}

typedef struct {
    int32_t slot[3];
} Slots;

static Slots slots_at(int64_t index, const int32_t extent[3]) {
    int64_t rest = index / extent[2];
    return (Slots){{(int32_t)(rest / extent[1]), (int32_t)(rest % extent[1]),
                    (int32_t)(index % extent[2])}};
}

INLINE void next_slot(Slots *at, const int32_t extent[3]) {
    if (++at->slot[2] < extent[2]) return;
    at->slot[2] = 0;
    if (++at->slot[1] < extent[1]) return;
    at->slot[1] = 0;
    at->slot[0]++;
}

static void find_rows(const WindowCall *c, WindowItem *item, WindowScratch *s) {
    if (item->is_special) {
        memcpy(s->row_position, c->special + item->first, 4 * (size_t)item->rows);
        return;
    }
    const int32_t *axis[3];
    int32_t extent[3];
    for (int a = 0; a < 3; a++) {
        axis[a] = c->queries[a] + (int64_t)item->tile[a] * c->tile[a];
        extent[a] = c->num_queries[a][item->tile[a]];
        item->first_slot[a] = INT32_MAX;
    }
    Slots at = slots_at(item->first, extent);
    for (int32_t i = 0; i < item->rows; i++) {
        s->row_position[i] = axis[0][at.slot[0]] + axis[1][at.slot[1]] + axis[2][at.slot[2]];
        for (int a = 0; a < 3; a++) {
            s->row_slot[a][i] = at.slot[a];
            if (at.slot[a] < item->first_slot[a]) item->first_slot[a] = at.slot[a];
            if (at.slot[a] > item->last_slot[a]) item->last_slot[a] = at.slot[a];
        }
        next_slot(&at, extent);
    }
}

/* Positions and slots of the keys from `first` on. */
static void find_keys(const WindowCall *c, const WindowItem *item, int64_t first, KeyGroup *g) {
    int64_t left = item->num_keys + c->num_special - first;
    g->count = (int)(left < GROUP ? left : GROUP);
    g->panels = (g->count + VL - 1) / VL;
    const int32_t *axis[3];
    for (int a = 0; a < 3; a++)
        axis[a] = item->is_special ? c->axis[a] : c->keys[a] + (int64_t)item->tile[a] * c->span[a];
    Slots at = slots_at(first, item->extent);
    for (int i = 0; i < g->count; i++) {
        if (first + i >= item->num_keys) {
            g->position[i] = c->special[first + i - item->num_keys];
            for (int a = 0; a < 3; a++) g->slot[a][i] = -1;
            continue;
        }
        g->position[i] = axis[0][at.slot[0]] + axis[1][at.slot[1]] + axis[2][at.slot[2]];
        for (int a = 0; a < 3; a++) g->slot[a][i] = at.slot[a];
        next_slot(&at, item->extent);
    }
}

/* Per axis, the words of keys that a query slot sees: those of the slots before `high` without those
 * of the slots before `low`. Returns 0 if no row sees any of them. */
static int find_words(const WindowCall *c, const WindowItem *item, const KeyGroup *g,
                      WindowScratch *s) {
    uint64_t seen[WORDS];
    memset(seen, 0xff, sizeof seen);
    for (int a = 0; a < 3 && !item->is_special; a++) {
        if (!c->masked[a]) continue;
        const int32_t *slot = g->slot[a];
        int32_t first = INT32_MAX, last = -1;
        for (int i = 0; i < g->count; i++) {
            if (slot[i] < 0) continue;
            if (slot[i] < first) first = slot[i];
            if (slot[i] > last) last = slot[i];
        }
        uint64_t special[WORDS] = {0}, any[WORDS] = {0};
        uint64_t *before = s->before; /* keys in slots first, ..., first + n - 1 */
        if (last < 0) first = 0;
        memset(before, 0, sizeof(uint64_t) * WORDS * (size_t)(last - first + 2));
        for (int i = 0; i < g->count; i++) {
            uint64_t *to = slot[i] < 0 ? special : before + (slot[i] - first + 1) * WORDS;
            to[i / 64] |= (uint64_t)1 << (i % 64);
        }
        for (int32_t n = WORDS; n < (last - first + 2) * WORDS; n++) before[n] |= before[n - WORDS];
        int64_t start = (int64_t)item->tile[a] * c->tile[a];
        for (int32_t r = item->first_slot[a]; r <= item->last_slot[a]; r++) {
            int32_t low = c->low[a][start + r], high = c->high[a][start + r];
            low = low < first ? first : low > last + 1 ? last + 1 : low;
            high = high < first ? first : high > last + 1 ? last + 1 : high;
            for (int n = 0; n < WORDS; n++) {
                uint64_t word = before[(high - first) * WORDS + n] & ~before[(low - first) * WORDS + n];
                s->words[a][r * WORDS + n] = word | special[n];
                any[n] |= word | special[n];
            }
        }
        for (int n = 0; n < WORDS; n++) seen[n] &= any[n];
    }
    uint64_t all = 0;
    for (int n = 0; n < WORDS; n++) all |= seen[n];
    return all != 0;
}

static void mask_keys(const WindowCall *c, const WindowItem *item, int32_t head, KeyGroup *g) {
    int64_t base = item->batch * c->mask_stride[0] + head * c->mask_stride[1];
    for (int n = 0; n < WORDS; n++) {
        int left = g->count - n * 64;
        g->visible[n] = left >= 64 ? ~(uint64_t)0 : left <= 0 ? 0 : ((uint64_t)1 << left) - 1;
    }
    for (int i = 0; c->seen && i < g->count; i++)
        if (!c->seen[base + g->position[i] * c->mask_stride[2]])
            g->visible[i / 64] &= ~((uint64_t)1 << (i % 64));
    g->is_whole = g->count % VL == 0 && !c->seen && !c->bias;
    for (int a = 0; a < 3; a++) g->is_whole &= item->is_special || !c->masked[a];
    for (int i = 0; c->bias && i < g->count; i++) {
        float raw = c->bias[base + g->position[i] * c->mask_stride[2]], bias = raw * LOG2E;
        /* the lowest finite value must not become -inf: a row of it is a plain mean */
        g->bias[i] = bias < -2e38f && raw > -INFINITY ? -2e38f : bias;
    }
}
