/* Attention of tokens over keys and values that lie in blocks: read in place, never gathered.

   Each token reads its own positions in order, so its result depends neither on the other tokens of the step nor on how
   a prompt was cut into pieces.
   Source of paged keys and values: https://arxiv.org/abs/2309.06180, section 4.1. */
#include <math.h>
#include <stdlib.h>

#include "common.h"

#define MAX_DIM 512
#define SPAN 4       /* vectors of a head that one pass holds in registers */
#define MAX_HEADS 4  /* query heads of one key head that one pass serves */

typedef struct {
    float *output;
    const float *query, *keys, *values;
    const int64_t *rows; /* per row: offset of its token, position, window start, index of its first block */
    const int64_t *blocks;
    int64_t num_heads, group, key_dim, value_dim, block_tokens, query_head_stride, query_token_stride, max_positions;
    float scale, softcap; /* softcap: zero for none */
} decode;

/* The positions of one row and head, one after the other, in one pool. The block after the current one is fetched line by
   line while this one is read: where it lies is known here, and to no prefetcher of the processor. */
typedef struct {
    const float *pool, *token, *next;
    const int64_t *blocks;
    int64_t block_tokens, left, dim, block_stride; /* left: tokens of this block, the current one included */
    int64_t num_left;                              /* blocks after this one */
} walk;

INLINE walk begin_walk(const decode *d, const float *pool, const int64_t *blocks, int64_t first, int64_t last, int64_t dim,
                       int64_t head) {
    int64_t block = first / d->block_tokens, offset = first % d->block_tokens;
    walk w = {.pool = pool + head * d->block_tokens * dim, .blocks = blocks + block, .block_tokens = d->block_tokens,
              .left = d->block_tokens - offset, .dim = dim, .block_stride = d->num_heads * d->block_tokens * dim,
              .num_left = last / d->block_tokens - block};
    w.token = w.pool + w.blocks[0] * w.block_stride + offset * dim;
    w.next = w.num_left ? w.pool + w.blocks[1] * w.block_stride + offset * dim : w.token;
    return w;
}

INLINE void fetch_ahead(const walk *w) {
    for (int64_t o = 0; o < w->dim; o += 16) __builtin_prefetch(w->next + o); /* lines of 64 bytes */
}

INLINE void advance(walk *w) {
    w->token += w->dim;
    w->next += w->dim;
    if (--w->left == 0) {
        w->left = w->block_tokens;
        w->blocks++;
        w->num_left--;
        w->token = w->pool + w->blocks[0] * w->block_stride;
        w->next = w->num_left > 0 ? w->pool + w->blocks[1] * w->block_stride : w->token;
    }
}

/* Turn scores into weights in place, exp(score - largest), and return their sum. */
static float soften(float *scores, int64_t count) {
    float largest = scores[0];
    for (int64_t i = 1; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    int64_t padded = CEIL_DIV(count, LANES) * LANES;
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    vec sum = splat(0);
    for (int64_t i = 0; i < padded; i += LANES) {
        vec found = exp_vec(load(scores + i) - largest);
        store(scores + i, found);
    }
    for (int64_t i = count; i < padded; i++) scores[i] = 0;
    for (int64_t i = 0; i < padded; i += LANES) sum += load(scores + i);
    return lane_sum(sum);
}

/* scores[h][i] = scale * query[h] . key[i] for HEADS heads that share their keys. */
#define SCORE(HEADS)                                                                                                  \
    static void score_##HEADS(const decode *d, const float *query, walk keys, float *scores, int64_t padded,         \
                              int64_t count) {                                                                        \
        int64_t whole = d->key_dim / LANES * LANES;                                                                   \
        for (int64_t i = 0; i < count; i++) {                                                                         \
            vec sums[HEADS];                                                                                          \
            fetch_ahead(&keys);                                                                                       \
            for (int h = 0; h < HEADS; h++) sums[h] = splat(0);                                                       \
            for (int64_t o = 0; o < whole; o += LANES) {                                                              \
                vec key = load(keys.token + o);                                                                       \
                for (int h = 0; h < HEADS; h++) sums[h] += key * load(query + h * d->query_head_stride + o);          \
            }                                                                                                         \
            for (int h = 0; h < HEADS; h++) {                                                                         \
                float sum = lane_sum(sums[h]);                                                                        \
                for (int64_t o = whole; o < d->key_dim; o++)                                                          \
                    sum += keys.token[o] * query[h * d->query_head_stride + o];                                       \
                scores[h * padded + i] = sum * d->scale;                                                              \
            }                                                                                                         \
            if (i + 1 < count) advance(&keys);                                                                        \
        }                                                                                                             \
    }

/* output[h] = sum of weights[h][i] * value[i], for HEADS heads and VECTORS vectors of the values' width. */
#define BLEND(HEADS, VECTORS)                                                                                         \
    static void blend_##HEADS##_##VECTORS(const decode *d, walk values, int64_t from, const float *weights,          \
                                          int64_t padded, int64_t count, float *output) {                             \
        vec sums[HEADS][VECTORS];                                                                                     \
        for (int h = 0; h < HEADS; h++)                                                                               \
            for (int v = 0; v < VECTORS; v++) sums[h][v] = splat(0);                                                  \
        for (int64_t i = 0; i < count; i++) {                                                                         \
            vec value[VECTORS];                                                                                       \
            fetch_ahead(&values);                                                                                     \
            for (int v = 0; v < VECTORS; v++) value[v] = load(values.token + from + v * LANES);                       \
            for (int h = 0; h < HEADS; h++)                                                                           \
                for (int v = 0; v < VECTORS; v++) sums[h][v] += value[v] * weights[h * padded + i];                   \
            if (i + 1 < count) advance(&values);                                                                      \
        }                                                                                                             \
        for (int h = 0; h < HEADS; h++)                                                                               \
            for (int v = 0; v < VECTORS; v++) store(output + h * d->value_dim + from + v * LANES, sums[h][v]);        \
    }
#define EACH(HEADS) SCORE(HEADS) BLEND(HEADS, 4) BLEND(HEADS, 1)
EACH(1) EACH(2) EACH(3) EACH(4)

#define CALL(HEADS)                                                                                                   \
    case HEADS:                                                                                                       \
        score_##HEADS(d, query, begin_walk(d, d->keys, blocks, first, row[1], d->key_dim, head), scores, padded, count);      \
        break;
#define CALL_BLEND(HEADS)                                                                                             \
    case HEADS:                                                                                                       \
        if (is_wide) blend_##HEADS##_4(d, values, from, scores, padded, count, output);                               \
        else blend_##HEADS##_1(d, values, from, scores, padded, count, output);                                       \
        break;

/* Attend for num_heads <= MAX_HEADS query heads of one key head. */
static void attend(const decode *d, const int64_t *row, int64_t head, int64_t first_head, int num_heads, float *scores) {
    int64_t first = row[2], count = row[1] + 1 - first, padded = CEIL_DIV(count, LANES) * LANES;
    const int64_t *blocks = d->blocks + row[3];
    int64_t query_head = head * d->group + first_head;
    const float *query = d->query + row[0] * d->query_token_stride + query_head * d->query_head_stride;
    float *output = d->output + (row[0] * d->num_heads * d->group + query_head) * d->value_dim;
    switch (num_heads) { CALL(1) CALL(2) CALL(3) CALL(4) }
    if (d->softcap > 0)
        for (int h = 0; h < num_heads; h++)
            for (int64_t i = h * padded; i < h * padded + count; i++)
                scores[i] = d->softcap * tanhf(scores[i] / d->softcap);
    float inverse[MAX_HEADS];
    for (int h = 0; h < num_heads; h++) inverse[h] = 1.0f / soften(scores + h * padded, count);
    walk values = begin_walk(d, d->values, blocks, first, row[1], d->value_dim, head);
    int64_t from = 0;
    while (from + LANES <= d->value_dim) {
        int is_wide = from + SPAN * LANES <= d->value_dim;
        switch (num_heads) { CALL_BLEND(1) CALL_BLEND(2) CALL_BLEND(3) CALL_BLEND(4) }
        from += is_wide ? SPAN * LANES : LANES;
    }
    for (int h = 0; h < num_heads; h++) {
        for (int64_t o = from; o < d->value_dim; o++) {
            walk w = values;
            float sum = 0;
            for (int64_t i = 0; i < count; i++) {
                sum += w.token[o] * scores[h * padded + i];
                if (i + 1 < count) advance(&w);
            }
            output[h * d->value_dim + o] = sum;
        }
        for (int64_t o = 0; o < d->value_dim; o++) output[h * d->value_dim + o] *= inverse[h];
    }
}

static void run_head(void *job, int64_t item) {
    const decode *d = job;
    float *scores = malloc((size_t)(MAX_HEADS * (d->max_positions + LANES)) * 4); /* Too large for a thread's stack. */
    for (int64_t head = 0; head < d->group; head += MAX_HEADS)
        attend(d, d->rows + item / d->num_heads * 4, item % d->num_heads, head, (int)MIN(MAX_HEADS, d->group - head),
               scores);
    free(scores);
}

int64_t native_max_head_dim(void) { return MAX_DIM; }

/* output: (T, num_heads * group, value_dim), only the rows' tokens are written; query: heads query_head_stride and tokens
   query_token_stride floats apart; keys, values: (blocks, num_heads, block_tokens, dim). softcap: scores become softcap tanh(score / softcap),
   https://arxiv.org/abs/2408.00118, section 2; zero for none. */
void native_decode_attention(float *output, const float *query, const float *keys, const float *values, const void *rows,
                             const void *blocks, int64_t num_rows, int64_t num_heads, int64_t group, int64_t key_dim,
                             int64_t value_dim, int64_t block_tokens, int64_t query_head_stride,
                             int64_t query_token_stride, int64_t max_positions, float scale, float softcap,
                             int num_threads) {
    decode d = {output, query, keys, values, rows, blocks, num_heads, group, key_dim, value_dim, block_tokens,
                query_head_stride, query_token_stride, max_positions, scale, softcap};
    run_items(run_head, &d, num_rows * num_heads, num_threads);
}

/* pool: (blocks, num_heads, block_tokens, dim); from: heads head_stride and tokens token_stride floats apart. A block that
   begins here is cleared first, so that nothing of its last owner is left. */
void native_write_cache(float *pool, const float *from, const void *places, int64_t num_tokens, int64_t num_heads,
                        int64_t dim, int64_t head_stride, int64_t token_stride, int64_t block_tokens) {
    const int64_t *to = places;
    for (int64_t t = 0; t < num_tokens; t++) {
        int64_t block = to[t] / block_tokens, offset = to[t] % block_tokens;
        float *place = pool + block * num_heads * block_tokens * dim;
        if (offset == 0) memset(place, 0, (size_t)(block_tokens * num_heads * dim) * 4);
        for (int64_t h = 0; h < num_heads; h++)
            memcpy(place + (h * block_tokens + offset) * dim, from + t * token_stride + h * head_stride, (size_t)dim * 4);
    }
}
