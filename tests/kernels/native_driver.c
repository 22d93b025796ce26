/* Random calls of the native kernels with buffers of exactly the right size, for sanitizers.
 * Prints the number of calls; exits 1 where an output differs from plain loops. */

#include "../../kernels/block_select/native.c"
#include "../../kernels/block_sparse/native.c"

#include <stdio.h>

static uint32_t state = 1;

static uint32_t below(uint32_t limit) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % limit;
}

static float normal(void) { return (float)below(2000) / 500.0f - 2.0f; }

static void *exactly(size_t bytes) { return malloc(bytes ? bytes : 1); }

static void fill(void *x, int64_t count, int dtype) {
    for (int64_t i = 0; i < count; i++) store_element(x, i, normal(), dtype);
}

/* One row by the definition. */
static double worst_of_row(const Call *c, int64_t b, int64_t h, int64_t row, const int *listed) {
    double top = -INFINITY, sum = 0, worst = 0, *out = calloc((size_t)c->dim_v, sizeof(double));
    int64_t kv = h / (c->heads / c->kv_heads), list = (b * c->heads + h) * c->list_stride[1];
    double *scores = exactly(sizeof(double) * (size_t)c->len_k);
    list += row / c->block_q * c->list_stride[2];
    for (int64_t j = 0; j < c->len_k; j++) {
        int64_t n = listed[(list / c->list_width) * ((c->len_k + c->block_k - 1) / c->block_k) +
                           j / c->block_k];
        int64_t inside = j % c->block_k, id = n < 0 ? -1 : c->mask_ids[list + n];
        int seen = n >= 0 && !(c->is_causal && j > row);
        if (seen && id >= 0)
            seen = c->mask_bits[(id * c->block_q + row % c->block_q) * c->mask_words + inside / 64] >>
                       (inside % 64) & 1;
        double score = 0;
        for (int64_t d = 0; d < c->dim; d++)
            score += (double)load_element(c->query, b * c->q_stride[0] + h * c->q_stride[1] +
                                                        row * c->q_stride[2] + d, c->dtype) *
                     load_element(c->key, b * c->k_stride[0] + kv * c->k_stride[1] +
                                              j * c->k_stride[2] + d, c->dtype);
        scores[j] = seen ? score * c->scale : -INFINITY;
        if (scores[j] > top) top = scores[j];
    }
    for (int64_t j = 0; j < c->len_k; j++) {
        double weight = scores[j] > -INFINITY ? exp(scores[j] - top) : 0;
        sum += weight;
        for (int64_t d = 0; d < c->dim_v; d++)
            out[d] += weight * load_element(c->value, b * c->v_stride[0] + kv * c->v_stride[1] +
                                                          j * c->v_stride[2] + d, c->dtype);
    }
    for (int64_t d = 0; d < c->dim_v; d++) {
        double expected = sum > 0 ? out[d] / sum : 0;
        double actual = load_element(c->out, b * c->o_stride[0] + h * c->o_stride[1] +
                                                 row * c->o_stride[2] + d, c->dtype);
        if (!(fabs(actual - expected) <= worst)) worst = fabs(actual - expected);
    }
    free(out);
    free(scores);
    return worst;
}

static void contiguous(int64_t stride[4], int64_t heads, int64_t length, int64_t dim) {
    stride[0] = heads * length * dim;
    stride[1] = length * dim;
    stride[2] = dim;
    stride[3] = 1;
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
    c.dtype = dtype;
    c.is_causal = (int)below(2);
    c.threads = 1 + (int)below(4);
    c.scale = 0.2f;
    contiguous(c.q_stride, c.heads, c.len_q, c.dim);
    contiguous(c.k_stride, c.kv_heads, c.len_k, c.dim);
    contiguous(c.v_stride, c.kv_heads, c.len_k, c.dim_v);
    contiguous(c.o_stride, c.heads, c.len_q, c.dim_v);
    int64_t size = size_of(&c), num_q = (c.len_q + c.block_q - 1) / c.block_q;
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
    }
    c.indices = indices;
    c.counts = used;
    c.mask_ids = ids;
    c.mask_bits = bits;
    int failed = retrofit_block_sparse(&c) != 0;
    double limit = dtype == FLOAT32 ? 1e-5 : dtype == FLOAT16 ? 3e-3 : 3e-2;
    for (int64_t b = 0; b < c.batch; b++)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t row = 0; row < c.len_q; row += 7)
                if (!(worst_of_row(&c, b, h, row, listed) <= limit)) failed = 1;
    void *all[] = {tensors[0], tensors[1], tensors[2], out, c.lse, indices, ids, used, listed, bits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    return failed;
}

/* Pools of a bounded number of tokens, and counts of what is kept. */
static int one_selection(int dtype) {
    PoolCall c = {.batch = 1 + below(2), .heads = 1 + below(3), .length = 1 + below(200)};
    c.dim = 1 + below(50);
    c.block = 1 + below(70);
    c.dtype = dtype;
    c.is_max = (int)below(2);
    c.threads = 1 + (int)below(3);
    contiguous(c.stride, c.heads, c.length, c.dim);
    int64_t count = c.batch * c.heads * c.length * c.dim, size = dtype == FLOAT32 ? 4 : 2;
    int64_t blocks = (c.length + c.block - 1) / c.block;
    void *tokens = exactly((size_t)(count * size));
    fill(tokens, count, dtype);
    c.tokens = tokens;
    c.pools = exactly(4 * (size_t)(c.batch * c.heads * blocks * c.dim));
    int failed = retrofit_pool(&c) != 0;
    for (int64_t i = 0; i < c.batch * c.heads * blocks * c.dim; i++)
        failed |= !(fabsf(c.pools[i]) <= 2.01f);
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
    int calls = argc > 1 ? atoi(argv[1]) : 20, failed = 0;
    for (int i = 0; i < calls; i++) failed += one_call(i % 3) + one_selection(i % 3);
    printf("%d calls, %d failed\n", calls, failed);
    return failed != 0;
}
