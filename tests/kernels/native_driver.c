/* Random calls of the native kernels with buffers of exactly the right size, for sanitizers.
 * Prints the number of calls; exits 1 where an output differs from plain loops. */

#include "../../kernels/block_select/native.c"
#include "../../kernels/block_sparse/native.c"
#include "../../kernels/grid_window/native.c"

#include <stdio.h>

static uint32_t state = 1;

static uint32_t below(uint32_t limit) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % limit;
}

static float normal(void) { return (float)below(2000) / 500.0f - 2.0f; }

/* Aligned as tensors are. */
static void *exactly(size_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes ? bytes : 1)) abort();
    return memory;
}

static void fill(void *x, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i++) store_element(x, i, normal(), dtype);
}

/* One row by the definition; rows of all tensors are contiguous. */
typedef struct {
    const void *query, *key, *value, *out; /* key, value: of the head */
    int64_t dim, dim_v, keys;
    const uint8_t *sees; /* [keys] */
    const float *bias;   /* [keys] or NULL */
    float scale;
    int dtype;
} Row;

static double error_of(const Row *r) {
    double top = -INFINITY, sum = 0, worst = 0, *out = calloc((size_t)r->dim_v, sizeof(double));
    double *scores = exactly(sizeof(double) * (size_t)r->keys);
    for (int64_t j = 0; j < r->keys; j++) {
        double score = 0;
        for (int64_t d = 0; d < r->dim; d++)
            score += (double)load_element(r->query, d, r->dtype) *
                     load_element(r->key, j * r->dim + d, r->dtype);
        score = score * r->scale + (r->bias ? r->bias[j] : 0);
        scores[j] = r->sees[j] ? score : -INFINITY;
        if (scores[j] > top) top = scores[j];
    }
    for (int64_t j = 0; j < r->keys; j++) {
        double weight = scores[j] > -INFINITY ? exp(scores[j] - top) : 0;
        sum += weight;
        for (int64_t d = 0; d < r->dim_v; d++)
            out[d] += weight * load_element(r->value, j * r->dim_v + d, r->dtype);
    }
    for (int64_t d = 0; d < r->dim_v; d++) {
        double expected = sum > 0 ? out[d] / sum : 0;
        double actual = load_element(r->out, d, r->dtype);
        if (!(fabs(actual - expected) <= worst)) worst = fabs(actual - expected);
    }
    free(out);
    free(scores);
    return worst;
}

static const double LIMITS[] = {[FLOAT32] = 1e-5, [BFLOAT16] = 3e-2, [FLOAT16] = 3e-3};

static const void *element(const void *base, int64_t index, int dtype) {
    return (const char *)base + index * (dtype == FLOAT32 ? 4 : 2);
}

static double worst_of_row(const Call *c, int64_t b, int64_t h, int64_t row, const int *listed) {
    int64_t kv = b * c->kv_heads + h / (c->heads / c->kv_heads), at = b * c->heads + h;
    int64_t list = at * c->list_stride[1] + row / c->block_q * c->list_stride[2];
    int64_t blocks = (c->len_k + c->block_k - 1) / c->block_k;
    uint8_t *sees = exactly((size_t)c->len_k);
    for (int64_t j = 0; j < c->len_k; j++) {
        int64_t n = listed[list / c->list_width * blocks + j / c->block_k];
        int64_t inside = j % c->block_k, id = n < 0 ? -1 : c->mask_ids[list + n];
        sees[j] = n >= 0 && !(c->is_causal && j > row);
        if (sees[j] && id >= 0)
            sees[j] = c->mask_bits[(id * c->block_q + row % c->block_q) * c->mask_words +
                                   inside / 64] >> (inside % 64) & 1;
    }
    int64_t mask = row * c->m_stride[2];
    for (int64_t j = 0; c->attn_mask_kind == MASK_BOOL && j < c->len_k; j++)
        sees[j] &= ((const uint8_t *)c->attn_mask)[mask + j];
    Row r = {.query = element(c->query, (at * c->len_q + row) * c->dim, c->dtype),
             .key = element(c->key, kv * c->len_k * c->dim, c->dtype),
             .bias = c->attn_mask_kind == MASK_FLOAT ? (const float *)c->attn_mask + mask : NULL,
             .value = element(c->value, kv * c->len_k * c->dim_v, c->dtype),
             .out = element(c->out, (at * c->len_q + row) * c->dim_v, c->dtype),
             .dim = c->dim, .dim_v = c->dim_v, .keys = c->len_k, .sees = sees,
             .scale = c->scale, .dtype = c->dtype};
    double worst = error_of(&r);
    free(sees);
    return worst;
}

static void contiguous(int64_t stride[3], int64_t heads, int64_t length, int64_t dim) {
    stride[0] = heads * length * dim;
    stride[1] = length * dim;
    stride[2] = dim;
}

static int one_call(int dtype) {
    Call c;
    memset(&c, 0, sizeof c);
    c.batch = 1 + below(2);
    c.kv_heads = 1 + below(2);
    c.heads = c.kv_heads * (1 + below(3));
    c.len_q = 1 + below(150);
    c.len_k = 1 + below(400);
    c.dim = 1 + below(70);
    c.dim_v = 1 + below(100);
    c.block_q = 1 + below(140);
    c.block_k = 1 + below(140);
    if (below(2)) { /* whole vectors */
        c.dim_v = VL * (1 + below(5));
        c.block_k = VL * (1 + below(6));
    }
    c.dtype = dtype;
    c.is_causal = (int)below(2);
    c.threads = 1 + (int)below(4);
    c.scale = 0.2f;
    contiguous(c.q_stride, c.heads, c.len_q, c.dim);
    contiguous(c.k_stride, c.kv_heads, c.len_k, c.dim);
    contiguous(c.v_stride, c.kv_heads, c.len_k, c.dim_v);
    contiguous(c.o_stride, c.heads, c.len_q, c.dim_v);
    int64_t size = element_size(c.dtype), num_q = (c.len_q + c.block_q - 1) / c.block_q;
    int64_t num_k = (c.len_k + c.block_k - 1) / c.block_k, rows = c.batch * c.heads * num_q;
    int64_t counts[] = {c.batch * c.heads * c.len_q * c.dim, c.batch * c.kv_heads * c.len_k * c.dim,
                        c.batch * c.kv_heads * c.len_k * c.dim_v};
    void *tensors[3], *out = exactly((size_t)(c.batch * c.heads * c.len_q * c.dim_v * size));
    for (int i = 0; i < 3; i++) fill(tensors[i] = exactly((size_t)(counts[i] * size)), counts[i], dtype);
    c.query = tensors[0];
    c.key = tensors[1];
    c.value = tensors[2];
    c.out = out;
    c.lse = exactly(4 * (size_t)(c.batch * c.heads * c.len_q));
    c.list_width = num_k;
    c.list_stride[0] = c.heads * num_q * num_k;
    c.list_stride[1] = num_q * num_k;
    c.list_stride[2] = num_k;
    c.num_masks = 3;
    c.mask_words = (c.block_k + 63) / 64;
    int32_t *indices = exactly(4 * (size_t)(rows * num_k)), *ids = exactly(4 * (size_t)(rows * num_k));
    int32_t *used = exactly(4 * (size_t)rows);
    int *listed = exactly(sizeof(int) * (size_t)(rows * num_k));
    uint64_t *bits = exactly(8 * (size_t)(c.num_masks * c.block_q * c.mask_words));
    for (int64_t i = 0; i < c.num_masks * c.block_q * c.mask_words; i++)
        bits[i] = (uint64_t)below(1u << 20) * below(1u << 20) * 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < rows; i++) {
        used[i] = 0;
        for (int64_t n = 0; n < num_k; n++) {
            listed[i * num_k + n] = -1;
            indices[i * num_k + n] = 0;
            ids[i * num_k + n] = (int)below(4) - 1;
            if (!below(2)) continue;
            listed[i * num_k + n] = used[i];
            indices[i * num_k + used[i]++] = (int32_t)n;
        }
        for (int32_t n = used[i] - 1; n > 0; n--) { /* in any order */
            int32_t other = (int32_t)below((uint32_t)n + 1), *at = indices + i * num_k, k = at[n];
            at[n] = at[other];
            at[other] = k;
            listed[i * num_k + at[n]] = n;
            listed[i * num_k + at[other]] = other;
        }
    }
    int64_t mask_rows = below(2) ? c.len_q : 1; /* of all rows alike, or of each */
    uint8_t *seen = exactly((size_t)(mask_rows * c.len_k));
    float *bias = exactly(4 * (size_t)(mask_rows * c.len_k));
    for (int64_t i = 0; i < mask_rows * c.len_k; i++) {
        seen[i] = below(5) != 0;
        bias[i] = normal();
    }
    c.attn_mask_kind = (int)below(3);
    c.attn_mask = c.attn_mask_kind == MASK_BOOL ? (void *)seen : bias;
    c.m_stride[2] = mask_rows > 1 ? c.len_k : 0;
    c.m_stride[3] = 1;
    c.indices = indices;
    c.counts = used;
    c.mask_ids = ids;
    c.mask_bits = bits;
    int failed = retrofit_block_sparse(&c) != 0;
    for (int64_t b = 0; b < c.batch; b++)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t row = 0; row < c.len_q; row += 7)
                if (!(worst_of_row(&c, b, h, row, listed) <= LIMITS[dtype])) failed = 1;
    void *all[] = {tensors[0], tensors[1], tensors[2], out,  c.lse, indices,
                   ids,        used,       listed,     bits, seen,  bias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return failed;
}

/* Scores that rise for one row must leave the sums of the others, all of whose scores are equal. */
static int rows_drift(void) {
    enum { ROWS = 2, TOKENS = 8192 };
    float *query = exactly(4 * ROWS), *key = exactly(4 * TOKENS), *value = exactly(4 * TOKENS);
    float out[ROWS];
    for (int i = 0; i < TOKENS; i++) {
        key[i] = (float)(i / 4);
        value[i] = i < TOKENS / 2;
    }
    query[0] = 8;
    query[1] = 0;
    Call c = {.query = query, .key = key, .value = value, .out = out, .batch = 1, .heads = 1};
    const uint8_t kept = 1;
    c.kv_heads = c.dim = c.dim_v = c.threads = 1;
    c.len_q = c.block_q = ROWS;
    c.len_k = c.block_k = TOKENS;
    for (int i = 0; i < 3; i++) c.q_stride[i] = c.k_stride[i] = c.v_stride[i] = c.o_stride[i] = 1;
    c.block_mask = &kept;
    c.list_stride[2] = 1;
    c.scale = 1;
    int failed = retrofit_block_sparse(&c) != 0 || !(fabsf(out[1] - 0.5f) <= 1e-6f);
    free(query);
    free(key);
    free(value);
    return failed;
}

/* Tables of one axis: coordinates cut into tiles, each with a range of keys. */
static void make_axis(WindowCall *c, int a, int32_t length, int32_t step) {
    int32_t tile = 1 + (int32_t)below((uint32_t)length), tiles = (length + tile - 1) / tile;
    int32_t *axis = exactly(4 * (size_t)length), *queries = exactly(4 * (size_t)(tiles * tile));
    int32_t *keys = exactly(4 * (size_t)(tiles * length)), *low = calloc((size_t)(tiles * tile), 4);
    int32_t *high = calloc((size_t)(tiles * tile), 4), *used = exactly(4 * (size_t)tiles);
    int32_t *num_keys = exactly(4 * (size_t)tiles);
    for (int32_t i = 0; i < length; i++) axis[i] = i * step;
    for (int32_t t = 0; t < tiles; t++) {
        int32_t first = (int32_t)below((uint32_t)length);
        num_keys[t] = 1 + (int32_t)below((uint32_t)(length - first));
        used[t] = length - t * tile < tile ? length - t * tile : tile;
        for (int32_t i = 0; i < length; i++) keys[t * length + i] = (first + i) % length * step;
        for (int32_t i = 0; i < tile; i++) {
            queries[t * tile + i] = (t * tile + i) % length * step;
            high[t * tile + i] = 1 + (int32_t)below((uint32_t)num_keys[t]);
            low[t * tile + i] = (int32_t)below((uint32_t)high[t * tile + i]);
        }
    }
    c->queries[a] = queries;
    c->keys[a] = keys;
    c->low[a] = low;
    c->high[a] = high;
    c->num_queries[a] = used;
    c->num_keys[a] = num_keys;
    c->axis[a] = axis;
    c->masked[a] = 1;
    c->num_tiles[a] = tiles;
    c->tile[a] = tile;
    c->span[a] = c->length[a] = length;
}

/* What the row of a query slot sees, by the tables. */
static void see_tile(const WindowCall *c, const int32_t tile[3], const int32_t slot[3], uint8_t *sees) {
    memset(sees, 0, (size_t)c->seq_len);
    int32_t low[3], high[3];
    for (int a = 0; a < 3; a++) {
        low[a] = c->low[a][tile[a] * c->tile[a] + slot[a]];
        high[a] = c->high[a][tile[a] * c->tile[a] + slot[a]];
    }
    for (int32_t x = low[0]; x < high[0]; x++)
        for (int32_t y = low[1]; y < high[1]; y++)
            for (int32_t z = low[2]; z < high[2]; z++)
                sees[c->keys[0][tile[0] * c->span[0] + x] + c->keys[1][tile[1] * c->span[1] + y] +
                     c->keys[2][tile[2] * c->span[2] + z]] = 1;
    for (int32_t i = 0; i < c->num_special; i++) sees[c->special[i]] = 1;
}

static int check_window_row(const WindowCall *c, int64_t position, uint8_t *sees) {
    int failed = 0;
    for (int64_t at = 0; at < c->batch * c->heads; at++) {
        int64_t kv = at / c->heads * c->kv_heads + at % c->heads / (c->heads / c->kv_heads);
        const uint8_t *seen = c->seen ? c->seen + at / c->heads * c->mask_stride[0] : NULL;
        for (int32_t j = 0; seen && !at && j < c->seq_len; j++) sees[j] &= seen[j];
        Row r = {.query = element(c->query, (at * c->seq_len + position) * c->dim, c->dtype),
                 .key = element(c->key, kv * c->seq_len * c->dim, c->dtype),
                 .value = element(c->value, kv * c->seq_len * c->dim_v, c->dtype),
                 .out = element(c->out, (at * c->seq_len + position) * c->dim_v, c->dtype),
                 .dim = c->dim, .dim_v = c->dim_v, .keys = c->seq_len, .sees = sees,
                 .bias = c->bias, .scale = c->scale, .dtype = c->dtype};
        failed |= !(error_of(&r) <= LIMITS[c->dtype]);
    }
    return failed;
}

/* A window call with random tables; the key mask is common to batch and heads. */
static int one_window(int dtype) {
    WindowCall c;
    memset(&c, 0, sizeof c);
    int32_t shape[3] = {1 + (int32_t)below(4), 1 + (int32_t)below(6), 1 + (int32_t)below(12)};
    make_axis(&c, 0, shape[0], shape[1] * shape[2]);
    make_axis(&c, 1, shape[1], shape[2]);
    make_axis(&c, 2, shape[2], 1);
    int32_t grid = shape[0] * shape[1] * shape[2], special[2] = {grid, grid + 1};
    c.special = special;
    c.num_special = (int32_t)below(3);
    c.seq_len = grid + c.num_special;
    c.batch = 1 + (int32_t)below(2);
    c.kv_heads = 1 + (int32_t)below(2);
    c.heads = c.kv_heads * (1 + (int32_t)below(2));
    c.dim = 1 + (int32_t)below(40);
    c.dim_v = 1 + (int32_t)below(40);
    c.rows_per_item = 1 + (int32_t)below((uint32_t)(c.tile[0] * c.tile[1] * c.tile[2]));
    c.dtype = dtype;
    c.threads = 1 + (int32_t)below(3);
    c.scale = 0.2f;
    contiguous(c.q_stride, c.heads, c.seq_len, c.dim);
    contiguous(c.k_stride, c.kv_heads, c.seq_len, c.dim);
    contiguous(c.v_stride, c.kv_heads, c.seq_len, c.dim_v);
    contiguous(c.o_stride, c.heads, c.seq_len, c.dim_v);
    int64_t size = dtype == FLOAT32 ? 4 : 2, rows = c.batch * c.seq_len, kind = below(3);
    int64_t counts[] = {rows * c.heads * c.dim, rows * c.kv_heads * c.dim,
                        rows * c.kv_heads * c.dim_v};
    void *tensors[3];
    for (int i = 0; i < 3; i++)
        fill(tensors[i] = exactly((size_t)(counts[i] * size)), counts[i], dtype);
    c.query = tensors[0];
    c.key = tensors[1];
    c.value = tensors[2];
    c.out = exactly((size_t)(rows * c.heads * c.dim_v * size));
    c.lse = exactly(4 * (size_t)(rows * c.heads));
    uint8_t *seen = exactly((size_t)c.seq_len), *sees = exactly((size_t)c.seq_len);
    float *bias = exactly(4 * (size_t)c.seq_len);
    for (int32_t i = 0; i < c.seq_len; i++) {
        seen[i] = below(4) != 0;
        bias[i] = normal();
    }
    c.seen = kind == 1 ? seen : NULL;
    c.bias = kind == 2 ? bias : NULL;
    c.mask_stride[2] = 1;
    int failed = retrofit_grid_window(&c) != 0;
    for (int32_t t = 0; t < c.num_tiles[0] * c.num_tiles[1] * c.num_tiles[2]; t++) {
        int32_t tile[3] = {t / (c.num_tiles[1] * c.num_tiles[2]),
                           t / c.num_tiles[2] % c.num_tiles[1], t % c.num_tiles[2]};
        int32_t slot[3];
        for (slot[0] = 0; slot[0] < c.num_queries[0][tile[0]]; slot[0]++)
            for (slot[1] = 0; slot[1] < c.num_queries[1][tile[1]]; slot[1]++)
                for (slot[2] = 0; slot[2] < c.num_queries[2][tile[2]]; slot[2]++) {
                    int64_t position = 0;
                    for (int a = 0; a < 3; a++)
                        position += c.queries[a][tile[a] * c.tile[a] + slot[a]];
                    see_tile(&c, tile, slot, sees);
                    failed |= check_window_row(&c, position, sees);
                }
    }
    for (int32_t i = 0; i < c.num_special; i++) {
        memset(sees, 1, (size_t)c.seq_len);
        failed |= check_window_row(&c, special[i], sees);
    }
    for (int i = 0; i < 3; i++) {
        const void *tables[] = {c.queries[i], c.keys[i], c.low[i], c.high[i],
                                c.num_queries[i], c.num_keys[i], c.axis[i], tensors[i]};
        for (size_t n = 0; n < sizeof tables / sizeof *tables; n++) free((void *)tables[n]);
    }
    free(c.out);
    free(c.lse);
    free(seen);
    free(sees);
    free(bias);
    return failed;
}

/* Pools against themselves. */
static int scores_are_right(const float *pools, int64_t groups, int64_t count, int64_t dim) {
    ScoreCall c = {.queries = pools, .keys = pools, .groups = groups, .rows = count};
    c.columns = count;
    c.dim = dim;
    c.threads = 1 + (int)below(3);
    c.scale = 0.1f; /* scores up to 30: what float32 leaves of 100 is too coarse */
    c.scores = exactly(4 * (size_t)(groups * count * count));
    int right = retrofit_score(&c) == 0;
    for (int64_t row = 0; row < groups * count; row++) {
        const float *q = pools + row * dim, *k = pools + row / count * count * dim;
        double sum = 0, *weights = exactly(sizeof(double) * (size_t)count);
        for (int64_t j = 0; j < count; j++) {
            double score = 0;
            for (int64_t d = 0; d < dim; d++) score += (double)q[d] * k[j * dim + d];
            sum += weights[j] = exp(score * 0.1);
        }
        for (int64_t j = 0; j < count; j++)
            right &= fabs(c.scores[row * count + j] - weights[j] / sum) <= 1e-5;
        free(weights);
    }
    free(c.scores);
    return right;
}

/* Pools of a bounded number of tokens, and counts of what is kept. */
static int one_selection(int dtype) {
    PoolCall c = {.batch = 1 + below(2), .heads = 1 + below(3), .length = 1 + below(200)};
    c.dim = 1 + below(90);
    c.block = 1 + below(70);
    c.dtype = dtype;
    c.is_max = (int)below(2);
    c.threads = 1 + (int)below(3);
    contiguous(c.stride, c.heads, c.length, c.dim);
    c.stride[3] = 1;
    int64_t count = c.batch * c.heads * c.length * c.dim, size = dtype == FLOAT32 ? 4 : 2;
    int64_t blocks = (c.length + c.block - 1) / c.block;
    void *tokens = exactly((size_t)(count * size));
    fill(tokens, count, dtype);
    c.tokens = tokens;
    c.pools = exactly(4 * (size_t)(c.batch * c.heads * blocks * c.dim));
    int failed = retrofit_pool(&c) != 0;
    for (int64_t i = 0; i < c.batch * c.heads * blocks * c.dim; i++)
        failed |= !(fabsf(c.pools[i]) <= 2.01f);
    failed |= !scores_are_right(c.pools, c.batch * c.heads, blocks, c.dim);
    SelectCall s = {.scores = c.pools, .heads = c.batch * c.heads, .rows = blocks};
    s.columns = c.dim;
    s.threads = c.threads;
    int64_t *fewest = exactly(8 * (size_t)s.heads), rows = s.heads * s.rows;
    for (int64_t h = 0; h < s.heads; h++) fewest[h] = below((uint32_t)s.columns + 1);
    s.fewest = fewest;
    s.kept = exactly((size_t)(rows * s.columns));
    failed |= retrofit_select(&s) != 0;
    for (int64_t i = 0; i < rows; i++) {
        int64_t kept = 0;
        for (int64_t n = 0; n < s.columns; n++) kept += s.kept[i * s.columns + n];
        failed |= kept != fewest[i / s.rows];
    }
    free(tokens);
    free(c.pools);
    free(fewest);
    free(s.kept);
    return failed;
}

int main(int argc, char **argv) {
    int calls = argc > 1 ? atoi(argv[1]) : 20, failed = rows_drift();
    for (int i = 0; i < calls; i++) failed += one_call(i % 3) + one_window(i % 3) + one_selection(i % 3);
    printf("%d calls, %d failed\n", calls, failed);
    return failed != 0;
}
