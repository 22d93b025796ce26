/* What a call is made of, and how keys and values are packed into panels of VL keys. */

#pragma once

#include "vectors.h"

enum { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

/* Mirrored by ctypes in native.py; strides count elements. */
typedef struct {
    const void *query, *key, *value;
    void *out;
    float *lse; /* [B, H, S_q] contiguous, or NULL */
    int64_t batch, heads, kv_heads, len_q, len_k, dim, dim_v;
    int64_t q_stride[4], k_stride[4], v_stride[4], o_stride[4];
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
    int32_t panel, key, block; /* panel of the head, its first key, position of its list entry */
    uint32_t bits;             /* lanes that hold a key that every row may see */
} PanelRef;

/* What one thread works in. */
typedef struct {
    char *base;
    float *q, *out, *weights, *sums, *maxima, *limits, *bias;
    PanelRef *panels;
    const uint64_t **entry_bits;
} Scratch;

typedef struct {
    const Call *call;
    int use_dot, in_place; /* in_place: values are read where they are, but for a short last panel */
    int64_t num_q, num_k, panels_per_block, num_panels, chunks_per_block, rows_per_item;
    int64_t groups, pack_items, attend_items, items;
    int64_t k_panel_bytes, v_panel_bytes, slot_bytes, vectors_v, depth;
    int64_t last_panel; /* in place: the short one, or -1 */
    int slots;
    char *packed;
    float sign, factor; /* sign of the scale, and |scale| * log2(e) */
    _Atomic int64_t next;
    _Atomic int invalid; /* a list names a block or mask that does not exist */
    _Atomic int64_t *packs_done, *attends_done;
} Job;

INLINE int64_t size_of(const Call *c) { return c->dtype == FLOAT32 ? 4 : 2; }

/* The 32 bits of a packed key: a float, or two consecutive bfloat16 elements for dot products. */
INLINE uint32_t load_word(const Job *job, const void *src, int64_t row, int64_t d) {
    const Call *c = job->call;
    const uint16_t *from = (const uint16_t *)src + row * c->k_stride[2];
    int64_t step = c->k_stride[3];
    if (job->use_dot) {
        uint32_t high = 2 * d + 1 < c->dim ? from[(2 * d + 1) * step] : 0;
        return from[2 * d * step] | high << 16;
    }
    float value = load_element(src, row * c->k_stride[2] + d * step, c->dtype);
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

/* Keys become columns: word dst[d * VL + j], zero from `rows` on. */
INLINE void pack_key_panel(const Job *job, const void *src, int64_t rows, void *dst,
                           const int dtype, const int dot) {
    const Call *c = job->call;
    uint32_t *to = dst;
    int64_t d = 0, row = c->k_stride[2];
    /* whole words only: an odd last element has no partner */
    int64_t whole = c->k_stride[3] != 1 ? 0 : dot ? c->dim / 2 : c->dim;
    for (; d + VL <= whole; d += VL) {
        vf x[VL];
        UNROLL
        for (int j = 0; j < VL; j++) {
            x[j] = (vf){0};
            if (j >= rows) continue;
            if (dot) x[j] = *(const vfu *)((const uint16_t *)src + j * row + 2 * d);
            else x[j] = load_floats(src, j * row + d, dtype);
        }
        transpose(x);
        UNROLL
        for (int j = 0; j < VL; j++) *(vf *)(to + (d + j) * VL) = x[j];
    }
    for (; d < job->depth; d++)
        for (int64_t j = 0; j < VL; j++)
            to[d * VL + j] = j < rows ? load_word(job, src, j, d) : 0;
}

/* Keys stay rows: word dst[j * width + d]; for dot products two keys share a word. */
INLINE void pack_value_panel(const Job *job, const void *src, int64_t rows, void *dst,
                             const int dtype, const int dot) {
    const Call *c = job->call;
    int64_t row = c->v_stride[2], step = c->v_stride[3], width = job->vectors_v * VL;
    if (dot) {
        uint32_t *to = dst;
        const uint16_t *from = src;
        for (int64_t j = 0; j < VL; j += 2, to += width) {
            const uint16_t *a = from + j * row, *b = a + row;
            int64_t first = j < rows ? c->dim_v : 0, second = j + 1 < rows ? c->dim_v : 0, d = 0;
            if (step == 1)
                for (; d + VL <= second; d += VL)
                    *(vi *)(to + d) = __builtin_convertvector(*(const vhu *)(a + d), vi) |
                                      __builtin_convertvector(*(const vhu *)(b + d), vi) << 16;
            for (; d < width; d++)
                to[d] = (d < first ? a[d * step] : 0u) |
                        (uint32_t)(d < second ? b[d * step] : 0) << 16;
        }
        return;
    }
    float *to = dst;
    for (int64_t j = 0; j < VL; j++, to += width) {
        int64_t d = 0, dims = j < rows ? c->dim_v : 0;
        if (step == 1)
            for (; d + VL <= dims; d += VL) *(vf *)(to + d) = load_floats(src, j * row + d, dtype);
        for (; d < width; d++)
            to[d] = d < dims ? load_element(src, j * row + d * step, dtype) : 0;
    }
}

NOINLINE void pack_keys(const Job *job, const void *k, int64_t rows, void *to) {
    int dtype = job->call->dtype;
    if (job->use_dot) pack_key_panel(job, k, rows, to, BFLOAT16, 1);
    else if (dtype == FLOAT32) pack_key_panel(job, k, rows, to, FLOAT32, 0);
    else pack_key_panel(job, k, rows, to, dtype, 0);
}

NOINLINE void pack_values(const Job *job, const void *v, int64_t rows, void *to) {
    int dtype = job->call->dtype;
    if (job->use_dot) pack_value_panel(job, v, rows, to, BFLOAT16, 1);
    else if (dtype == FLOAT32) pack_value_panel(job, v, rows, to, FLOAT32, 0);
    else pack_value_panel(job, v, rows, to, dtype, 0);
}

static char *slot_of(const Job *job, int64_t group) {
    return job->packed + group % job->slots * job->slot_bytes;
}

/* The head's packed values, of which there may be only the last panel. */
static char *packed_values(const Job *job, int64_t group) {
    return slot_of(job, group) + job->num_panels * job->k_panel_bytes;
}

static const char *head_values(const Job *job, int64_t group) {
    const Call *c = job->call;
    int64_t b = group / c->kv_heads, h = group % c->kv_heads;
    return (const char *)c->value + (b * c->v_stride[0] + h * c->v_stride[1]) * size_of(c);
}

INLINE void prefetch_rows(const char *from, int64_t rows, int64_t stride, int64_t bytes,
                          const int to_write) {
    for (int64_t r = 0; r < rows; r++, from += stride)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, to_write, 2);
}

static void pack_item(const Job *job, int64_t group, int64_t item) {
    const Call *c = job->call;
    int64_t size = size_of(c), b = group / c->kv_heads, h = group % c->kv_heads;
    const char *k = (const char *)c->key + (b * c->k_stride[0] + h * c->k_stride[1]) * size;
    const char *v = head_values(job, group);
    char *to_k = slot_of(job, group), *to_v = packed_values(job, group);
    int64_t k_row = c->k_stride[2] * size, v_row = c->v_stride[2] * size;
    int64_t first = item * PACK_KEYS / VL, last = first + PACK_KEYS / VL;
    if (last > job->num_panels) last = job->num_panels;
    for (int64_t panel = first; panel < last; panel++) {
        int64_t block = panel / job->panels_per_block, inside = panel % job->panels_per_block * VL;
        int64_t start = block * c->block_k + inside, rows = c->block_k - inside;
        if (rows > c->len_k - start) rows = c->len_k - start;
        if (rows > VL) rows = VL;
        if (rows <= 0) continue;
        /* rows a page apart are out of the hardware's sight */
        int64_t ahead = start + PACK_AHEAD, left = c->len_k - ahead < rows ? c->len_k - ahead : rows;
        prefetch_rows(k + ahead * k_row, left, k_row, c->dim * size, 0);
        pack_keys(job, k + start * k_row, rows, to_k + panel * job->k_panel_bytes);
        if (!job->in_place) {
            prefetch_rows(v + ahead * v_row, left, v_row, c->dim_v * size, 0);
            pack_values(job, v + start * v_row, rows, to_v + panel * job->v_panel_bytes);
        } else if (panel == job->last_panel) {
            pack_values(job, v + start * v_row, rows, to_v);
        }
    }
}
