/* What a call is made of: lists of key blocks, walked KEYS keys at a time, and who sees which. */

#pragma once

#include "tiles.h"

enum { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

#define MAX_ROWS 192 /* query rows per work item, a multiple of LANES */

/* Mirrored by ctypes in native.py; strides count elements, and those of the last axis are 1. */
typedef struct {
    const void *query, *key, *value;
    void *out;
    float *lse; /* [B, H, S_q] contiguous, or NULL */
    int64_t batch, heads, kv_heads, len_q, len_k, dim, dim_v;
    int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
    int64_t block_q, block_k;
    const uint8_t *block_mask; /* [B', H', n_q, n_k], or NULL where lists are given */
    const int32_t *indices, *counts, *mask_ids;
    const uint64_t *mask_bits; /* [n_masks, block_q, mask_words] */
    int64_t list_stride[3];    /* rows of block_mask or indices per batch, head and query block */
    int64_t list_width, num_masks, mask_words;
    const void *attn_mask;
    int64_t m_stride[4];
    int32_t dtype, attn_mask_kind, is_causal, threads;
    float scale;
} Call;

typedef struct {
    const Call *call;
    Shape shape;
    int64_t num_q, num_k, chunks_per_block, rows_per_item, items;
    _Atomic int64_t next;
    _Atomic int invalid; /* a list names a block or mask that does not exist */
} Job;

typedef struct {
    int64_t b, h, block, row, rows; /* row: the first */
    const char *key, *value;        /* of the head */
} Item;

/* The keys of one list, in order. */
typedef struct {
    const uint8_t *kept;    /* the list as a mask, or NULL */
    const int32_t *indices; /* the list */
    const int32_t *ids;     /* of the masks of its blocks, or NULL */
    int64_t entries, entry; /* entry: the one being read */
    int64_t key, end;       /* next key of it; end: none is left */
    int64_t limit;          /* one past the last key that may be seen */
    const uint64_t *bits;   /* the mask of its block, or NULL */
} Walk;

/* The keys of a walk that were met last. */
typedef struct {
    Rows rows;
    int32_t key[KEYS]; /* position in the sequence */
    int pieces;        /* parts of it that have a mask of bits */
    struct {
        int first, count;
        const uint64_t *bits; /* of the block's first row, from the word that holds these keys */
        int shift;            /* of the first key in that word */
    } piece[KEYS];
} Batch;

static Walk start_walk(Job *job, const Item *item, int64_t block, int64_t last_row) {
    const Call *c = job->call;
    int64_t at = item->b * c->list_stride[0] + item->h * c->list_stride[1] + block * c->list_stride[2];
    Walk w = {.entries = job->num_k, .entry = -1, .limit = c->len_k};
    if (c->is_causal && last_row + 1 < c->len_k) w.limit = last_row + 1;
    if (c->block_mask) {
        w.kept = c->block_mask + at;
        return w;
    }
    w.indices = c->indices + at;
    w.entries = c->counts[at / c->list_width];
    if (c->mask_ids) w.ids = c->mask_ids + at;
    if (w.entries < 0 || w.entries > c->list_width) {
        atomic_store(&job->invalid, 1);
        w.entries = 0;
    }
    return w;
}

/* Step to the next block of the list; 0 if there is none. */
static int next_block(Job *job, Walk *w) {
    const Call *c = job->call;
    while (++w->entry < w->entries) {
        if (w->kept && !w->kept[w->entry]) continue;
        int64_t k = w->kept ? w->entry : w->indices[w->entry];
        int32_t id = w->ids ? w->ids[w->entry] : -1;
        if (k < 0 || k >= job->num_k || id >= c->num_masks) {
            atomic_store(&job->invalid, 1);
            return 0;
        }
        w->key = k * c->block_k;
        w->end = w->key + c->block_k < w->limit ? w->key + c->block_k : w->limit;
        w->bits = id < 0 ? NULL : c->mask_bits + id * c->block_q * c->mask_words;
        if (w->key < w->end) return 1;
    }
    return 0;
}

/* Up to KEYS keys; those that a mask over keys alone hides are left out. */
static void next_batch(Job *job, const Item *item, Walk *w, Batch *batch) {
    const Call *c = job->call;
    int64_t size = element_size(c->dtype), k_row = c->k_stride[2] * size, v_row = c->v_stride[2] * size;
    const uint8_t *hides = NULL;
    if (c->attn_mask_kind == MASK_BOOL && !c->m_stride[2])
        hides = (const uint8_t *)c->attn_mask + item->b * c->m_stride[0] + item->h * c->m_stride[1];
    int count = 0;
    batch->pieces = 0;
    while (count < KEYS && (w->key < w->end || next_block(job, w))) {
        int64_t first = w->key, inside = first % c->block_k, end = first + KEYS - count;
        if (end > w->end) end = w->end;
        if (w->bits) { /* within a word of bits, and every key in its place */
            if (end > first + 64 - inside % 64) end = first + 64 - inside % 64;
            batch->piece[batch->pieces].first = count;
            batch->piece[batch->pieces].count = (int)(end - first);
            batch->piece[batch->pieces].shift = (int)(inside % 64);
            batch->piece[batch->pieces++].bits = w->bits + inside / 64;
        }
        const char *k = item->key + first * k_row, *v = item->value + first * v_row;
        int from = count;
        if (hides && !w->bits) {
            for (int64_t i = 0; i < end - first; i++)
                if (hides[(first + i) * c->m_stride[3]]) batch->key[count++] = (int32_t)(first + i);
        } else {
            for (int64_t i = 0; i < end - first; i++) batch->key[count++] = (int32_t)(first + i);
        }
        for (int i = from; i < count; i++) {
            batch->rows.key[i] = k + (batch->key[i] - first) * k_row;
            batch->rows.value[i] = v + (batch->key[i] - first) * v_row;
        }
        w->key = end;
    }
    batch->rows.count = count;
}

/* ---- who sees which ---------------------------------------------------------------------------- */

/* Bit i of word j becomes bit j of word i. */
static void transpose_bits(uint64_t x[64]) {
    uint64_t mask = 0xffffffffu;
    for (int step = 32; step; step /= 2, mask ^= mask << step)
        for (int i = 0; i < 64; i = (i + step + 1) & ~step) {
            uint64_t turned = (x[i] >> step ^ x[i + step]) & mask;
            x[i] ^= turned << step;
            x[i + step] ^= turned;
        }
}

/* The lanes that see each key of a batch; 0 if all lanes see all, and then `seen` is not filled. */
static int find_seen(const Job *job, const Item *item, int64_t row, int rows, const Batch *batch,
                     uint64_t seen[64]) {
    const Call *c = job->call;
    int count = batch->rows.count, is_cut = 0;
    const uint8_t *mask = NULL;
    if (c->attn_mask_kind == MASK_BOOL && (c->m_stride[2] || batch->pieces))
        mask = (const uint8_t *)c->attn_mask + item->b * c->m_stride[0] + item->h * c->m_stride[1];
    for (int i = 0; c->is_causal && i < count; i++) is_cut |= batch->key[i] > row;
    if (!is_cut && !mask && !batch->pieces) return 0;
    for (int r = 0; r < 64; r++) seen[r] = r < rows ? ~(uint64_t)0 : 0; /* by rows at first */
    for (int n = 0; n < batch->pieces; n++) {
        uint64_t ones = lanes_of(batch->piece[n].count) << batch->piece[n].first;
        const uint64_t *bits = batch->piece[n].bits + (row - item->block * c->block_q) * c->mask_words;
        for (int r = 0; r < rows; r++)
            seen[r] &= ~ones | bits[r * c->mask_words] >> batch->piece[n].shift
                                                       << batch->piece[n].first;
    }
    for (int r = 0; mask && r < rows; r++)
        for (int i = 0; i < count; i++)
            if (!mask[(row + r) * c->m_stride[2] + batch->key[i] * c->m_stride[3]])
                seen[r] &= ~((uint64_t)1 << i);
    transpose_bits(seen);
    for (int i = 0; is_cut && i < count; i++) {
        int64_t hidden = batch->key[i] - row; /* rows before the key */
        if (hidden > 0) seen[i] = hidden < 64 ? seen[i] >> hidden << hidden : 0;
    }
    return 1;
}

/* The float mask of some keys for VL rows, of which `rows` exist; rows of it become lanes. */
static void load_bias_lanes(const float *base, const int64_t stride[4], int rows, const int32_t *key,
                            int count, vf *bias) {
    int i = 0;
    while (i < count) {
        vf x[VL];
        int follow = stride[3] == 1 && i + VL <= count;
        for (int n = 1; follow && n < VL; n++) follow = key[i + n] == key[i] + n;
        if (follow) {
            for (int r = 0; r < VL; r++) x[r] = (vf){0};
            for (int r = 0; r < rows; r++) x[r] = *(const vfu *)(base + r * stride[2] + key[i]);
            transpose(x);
        } else {
            x[0] = (vf){0};
            for (int r = 0; r < rows; r++) x[0][r] = base[r * stride[2] + key[i] * stride[3]];
        }
        for (int n = 0; n < (follow ? VL : 1); n++) bias[i++ * NV] = scale_bias(x[n]);
    }
    for (int n = 0; n < MR; n++) bias[i++ * NV] = (vf){0}; /* keys that fill a tile have one too */
}

static void load_bias(const Job *job, const Item *item, int64_t row, const Strip *t,
                      const int32_t *key, int count, vf *bias) {
    const Call *c = job->call;
    const float *base = (const float *)c->attn_mask + item->b * c->m_stride[0] +
                        item->h * c->m_stride[1] + row * c->m_stride[2];
    for (int v = 0; v < t->width; v++) {
        int rows = t->rows - v * VL < VL ? t->rows - v * VL : VL;
        load_bias_lanes(base + v * VL * c->m_stride[2], c->m_stride, rows, key, count, bias + v);
    }
}
