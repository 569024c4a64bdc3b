/* Attention of rows with one new token each, over keys and values that lie in blocks: read in place, never gathered.

   Each row reads its own positions in order, so its result does not depend on the other rows.
   Source of paged keys and values: https://arxiv.org/abs/2309.06180, section 4.1. */
#include <math.h>

#include "common.h"

#define MAX_DIM 512
#define SPAN (MAX_DIM / LANES)

typedef struct {
    float *output;
    const float *query, *keys, *values;
    const int64_t *rows; /* per row: offset of its token, position, window start, index of its first block */
    const int64_t *blocks;
    int64_t num_heads, group, key_dim, value_dim, block_tokens, query_head_stride, query_token_stride, max_positions;
    float scale;
} decode;

/* Cody-Waite reduction and a polynomial of degree 6: within 2 units in the last place of exp for x <= 0. */
INLINE vec exp_vec(vec x) {
    typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    ivec is_low = x < -87.0f;
    x = (vec)((is_low & (ivec)splat(-87.0f)) | (~is_low & (ivec)x));
    vec n = x * 1.44269504f;
    ivec whole = __builtin_convertvector(n - 0.5f, ivec); /* x <= 0: towards zero from below is the nearest */
    vec f = __builtin_convertvector(whole, vec);
    vec r = x - f * 0.693359375f - f * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (whole + 127) << 23;
    return p * (vec)bits;
}

INLINE const float *place(const decode *d, const float *pool, const int64_t *blocks, int64_t position, int64_t dim) {
    int64_t token = blocks[position / d->block_tokens] * d->block_tokens + position % d->block_tokens;
    return pool + token * d->num_heads * dim;
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    vec sum = splat(0);
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) sum += load(a + i) * load(b + i);
    float total = lane_sum(sum);
    for (; i < dim; i++) total += a[i] * b[i];
    return total;
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

static void attend(const decode *d, const int64_t *row, int64_t head, float *scores) {
    int64_t first = row[2], count = row[1] + 1 - first, padded = CEIL_DIV(count, LANES) * LANES;
    const int64_t *blocks = d->blocks + row[3];
    const float *query = d->query + row[0] * d->query_token_stride + head * d->group * d->query_head_stride;
    for (int64_t i = 0; i < count; i++) {
        const float *key = place(d, d->keys, blocks, first + i, d->key_dim) + head * d->key_dim;
        for (int64_t g = 0; g < d->group; g++)
            scores[g * padded + i] = dot(query + g * d->query_head_stride, key, d->key_dim) * d->scale;
    }
    for (int64_t g = 0; g < d->group; g++) {
        float *weights = scores + g * padded, inverse = 1.0f / soften(weights, count);
        float *output = d->output + (row[0] * d->num_heads * d->group + head * d->group + g) * d->value_dim;
        vec sums[SPAN];
        int64_t whole = d->value_dim / LANES;
        for (int64_t s = 0; s < whole; s++) sums[s] = splat(0);
        float rest[LANES] = {0};
        for (int64_t i = 0; i < count; i++) {
            const float *value = place(d, d->values, blocks, first + i, d->value_dim) + head * d->value_dim;
            for (int64_t s = 0; s < whole; s++) sums[s] += load(value + s * LANES) * weights[i];
            for (int64_t o = whole * LANES; o < d->value_dim; o++) rest[o - whole * LANES] += value[o] * weights[i];
        }
        for (int64_t s = 0; s < whole; s++) store(output + s * LANES, sums[s] * inverse);
        for (int64_t o = whole * LANES; o < d->value_dim; o++) output[o] = rest[o - whole * LANES] * inverse;
    }
}

static void run_head(void *job, int64_t item) {
    const decode *d = job;
    float scores[d->group * (d->max_positions + LANES)];
    attend(d, d->rows + item / d->num_heads * 4, item % d->num_heads, scores);
}

int64_t native_max_head_dim(void) { return MAX_DIM; }

/* output: (T, num_heads * group, value_dim), only the rows' tokens are written; query: heads query_head_stride and tokens
   query_token_stride floats apart; keys, values: (blocks, block_tokens, num_heads, dim). */
void native_decode_attention(float *output, const float *query, const float *keys, const float *values, const void *rows,
                             const void *blocks, int64_t num_rows, int64_t num_heads, int64_t group, int64_t key_dim,
                             int64_t value_dim, int64_t block_tokens, int64_t query_head_stride,
                             int64_t query_token_stride, int64_t max_positions, float scale, int num_threads) {
    decode d = {output, query, keys, values, rows, blocks, num_heads, group, key_dim, value_dim, block_tokens,
                query_head_stride, query_token_stride, max_positions, scale};
    run_items(run_head, &d, num_rows * num_heads, num_threads);
}

/* pool: (places, num_heads, dim); from: heads head_stride and tokens token_stride floats apart. A block that begins here is
   cleared first, so that nothing of its last owner is left. */
void native_write_cache(float *pool, const float *from, const void *places, int64_t num_tokens, int64_t num_heads,
                        int64_t dim, int64_t head_stride, int64_t token_stride, int64_t block_tokens) {
    const int64_t *to = places;
    for (int64_t t = 0; t < num_tokens; t++) {
        float *place = pool + to[t] * num_heads * dim;
        if (to[t] % block_tokens == 0) memset(place, 0, (size_t)(block_tokens * num_heads * dim) * 4);
        for (int64_t h = 0; h < num_heads; h++)
            memcpy(place + h * dim, from + t * token_stride + h * head_stride, (size_t)dim * 4);
    }
}
