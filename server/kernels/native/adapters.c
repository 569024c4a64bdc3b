/* What adapters add to the linears of one group: low rank, diagonals and gates, for many segments in one call.

   For token t of a chunk that uses slot z:
       y[t] = out_scale * (y[t] + delta_scale * (B ((A x[t]) * rank_scale * gate[t]))) + out_shift
   at each slot's own rank. Source of batching by segments: Punica, https://arxiv.org/abs/2310.18547. */
#include <stdlib.h>

#include "common.h"

#define CHUNK_TOKENS 8
#define SHRINK_RANKS 4
#define SPAN 4 /* vectors of outputs that one pass of the expansion holds */
#define AHEAD 4 /* rows of B to ask for before they are needed: they lie a stride apart, where no prefetcher follows */

typedef struct {
    const float *a, *b; /* a: (rank, num_in), rows a_stride apart; b: (rank, width) transposed, rows b_stride apart */
    const float *rank_scale, *delta_scale, *out_scale, *out_shift; /* null for ones or zeros */
    const int64_t *expert_of_rank;
    int64_t rank, a_stride, b_stride, is_used;
} slot_weights;

typedef struct {
    int64_t start, width; /* columns of y */
} member;

typedef struct {
    int64_t slot, first, num_tokens;
} chunk;

/* Tokens that read the same A and B: those of one slot, or of slots that share them. */
typedef struct {
    int64_t num_tokens, slots[CHUNK_TOKENS], tokens[CHUNK_TOKENS];
} batch;

typedef struct {
    float *y;
    const float *x, *gates;
    const slot_weights *slots; /* [slot][member] */
    const member *members;
    const batch *batches;
    int64_t num_members, num_in, y_stride, x_stride, num_experts, max_rank;
} deltas;

/* v[t] = A x[t] for TOKENS tokens and RANKS rows of A; every sum runs over its inputs in order. */
#define SHRINK(RANKS, TOKENS)                                                                                         \
    static void shrink_##RANKS##_##TOKENS(float *v, int64_t v_stride, const float *a, int64_t a_stride,              \
                                          const float *const *x, int64_t num_in) {                                   \
        vec sums[RANKS][TOKENS];                                                                                      \
        for (int r = 0; r < RANKS; r++)                                                                               \
            for (int t = 0; t < TOKENS; t++) sums[r][t] = splat(0);                                                   \
        int64_t k = 0;                                                                                                \
        for (; k + LANES <= num_in; k += LANES)                                                                       \
            for (int r = 0; r < RANKS; r++) {                                                                         \
                vec row = load(a + r * a_stride + k);                                                                 \
                for (int t = 0; t < TOKENS; t++) sums[r][t] += row * load(x[t] + k);                                  \
            }                                                                                                         \
        for (int r = 0; r < RANKS; r++)                                                                               \
            for (int t = 0; t < TOKENS; t++) {                                                                        \
                float sum = lane_sum(sums[r][t]);                                                                     \
                for (int64_t i = k; i < num_in; i++) sum += a[r * a_stride + i] * x[t][i];                            \
                v[t * v_stride + r] = sum;                                                                            \
            }                                                                                                         \
    }
SHRINK(4, 4)
SHRINK(4, 1)
SHRINK(8, 1)
SHRINK(1, 1)

static void shrink(float *v, const deltas *d, const slot_weights *w, const batch *b) {
    const float *x[CHUNK_TOKENS];
    for (int64_t t = 0; t < b->num_tokens; t++) x[t] = d->x + b->tokens[t] * d->x_stride;
    int64_t r = 0, num_fours = b->num_tokens / 4 * 4, stride = d->max_rank;
    for (; r + SHRINK_RANKS <= w->rank; r += SHRINK_RANKS) {
        const float *a = w->a + r * w->a_stride;
        if (b->num_tokens == 1 && r + 2 * SHRINK_RANKS <= w->rank) {
            shrink_8_1(v + r, stride, a, w->a_stride, x, d->num_in);
            r += SHRINK_RANKS;
            continue;
        }
        for (int64_t t = 0; t < num_fours; t += 4) shrink_4_4(v + t * stride + r, stride, a, w->a_stride, x + t, d->num_in);
        for (int64_t t = num_fours; t < b->num_tokens; t++)
            shrink_4_1(v + t * stride + r, stride, a, w->a_stride, x + t, d->num_in);
    }
    for (; r < w->rank; r++)
        for (int64_t t = 0; t < b->num_tokens; t++)
            shrink_1_1(v + t * stride + r, stride, w->a + r * w->a_stride, w->a_stride, x + t, d->num_in);
}

static void scale_ranks(float *v, const deltas *d, const slot_weights *w, int64_t token) {
    for (int64_t r = 0; r < w->rank; r++) {
        if (w->rank_scale) v[r] *= w->rank_scale[r];
        if (w->expert_of_rank && d->gates) v[r] *= d->gates[token * d->num_experts + w->expert_of_rank[r]];
    }
}

/* Finish `count` outputs from column o on: y = out_scale * (y + delta_scale * delta) + out_shift. */
INLINE void finish(float *y, const float *delta, const slot_weights *w, int64_t o, int64_t count) {
    if (!w->delta_scale && !w->out_scale && !w->out_shift) {
        for (int64_t i = 0; i < count; i++) y[i] += delta[i];
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float value = w->delta_scale ? y[i] + delta[i] * w->delta_scale[o + i] : y[i] + delta[i];
        if (w->out_scale) value *= w->out_scale[o + i];
        if (w->out_shift) value += w->out_shift[o + i];
        y[i] = value;
    }
}

/* SPAN vectors of outputs from column o on, for TOKENS tokens. */
#define EXPAND(TOKENS)                                                                                                \
    static void expand_##TOKENS(float *const *y, const float *v, int64_t v_stride, const slot_weights *const *w,     \
                                int64_t o) {                                                                          \
        vec sums[TOKENS][SPAN];                                                                                       \
        for (int t = 0; t < TOKENS; t++)                                                                              \
            for (int s = 0; s < SPAN; s++) sums[t][s] = splat(0);                                                     \
        const float *b = w[0]->b + o;                                                                                 \
        for (int64_t r = 0; r < w[0]->rank; r++, b += w[0]->b_stride)                                                 \
            for (int s = 0; s < SPAN; s++) {                                                                          \
                __builtin_prefetch(b + AHEAD * w[0]->b_stride + s * LANES);                                           \
                vec column = load(b + s * LANES);                                                                     \
                for (int t = 0; t < TOKENS; t++) sums[t][s] += column * v[t * v_stride + r];                          \
            }                                                                                                         \
        for (int t = 0; t < TOKENS; t++) {                                                                            \
            float delta[SPAN * LANES];                                                                                \
            for (int s = 0; s < SPAN; s++) store(delta + s * LANES, sums[t][s]);                                      \
            finish(y[t] + o, delta, w[t], o, SPAN * LANES);                                                           \
        }                                                                                                             \
    }
EXPAND(4)
EXPAND(1)

static void expand(const deltas *d, const slot_weights *const *w, const member *m, const float *v, const batch *b) {
    float *y[CHUNK_TOKENS];
    for (int64_t t = 0; t < b->num_tokens; t++) y[t] = d->y + b->tokens[t] * d->y_stride + m->start;
    int64_t o = 0, num_fours = b->num_tokens / 4 * 4, stride = d->max_rank;
    for (; o + SPAN * LANES <= m->width; o += SPAN * LANES) {
        for (int64_t t = 0; t < num_fours; t += 4) expand_4(y + t, v + t * stride, stride, w + t, o);
        for (int64_t t = num_fours; t < b->num_tokens; t++) expand_1(y + t, v + t * stride, stride, w + t, o);
    }
    for (; o < m->width; o++)
        for (int64_t t = 0; t < b->num_tokens; t++) {
            float delta = 0;
            for (int64_t r = 0; r < w[0]->rank; r++) delta += w[0]->b[r * w[0]->b_stride + o] * v[t * stride + r];
            finish(y[t] + o, &delta, w[t], o, 1);
        }
}

static void apply_batch(void *job, int64_t item) {
    const deltas *d = job;
    const batch *b = d->batches + item / d->num_members;
    int64_t index = item % d->num_members;
    const slot_weights *w[CHUNK_TOKENS];
    for (int64_t t = 0; t < b->num_tokens; t++) w[t] = d->slots + b->slots[t] * d->num_members + index;
    if (!w[0]->is_used) return;
    float v[CHUNK_TOKENS * d->max_rank + 1];
    shrink(v, d, w[0], b);
    for (int64_t t = 0; t < b->num_tokens; t++) scale_ranks(v + t * d->max_rank, d, w[t], b->tokens[t]);
    expand(d, w, d->members + index, v, b);
}

/* Whether the slots read the same projections everywhere: VeRA adapters of one key do. */
static int share_projections(const deltas *d, int64_t one, int64_t other) {
    const slot_weights *u = d->slots + one * d->num_members, *w = d->slots + other * d->num_members;
    for (int64_t i = 0; i < d->num_members; i++)
        if (u[i].a != w[i].a || u[i].b != w[i].b || u[i].rank != w[i].rank || u[i].is_used != w[i].is_used ||
            !u[i].rank)
            return 0;
    return 1;
}

/* Put each chunk into a batch; chunks of slots that share projections fill one batch together. Returns how many. */
static int64_t gather_batches(batch *batches, const deltas *d, const chunk *chunks, int64_t num_chunks) {
    int64_t num_batches = 0;
    for (int64_t c = 0; c < num_chunks; c++) {
        batch *to = 0;
        for (int64_t i = 0; i < num_batches && !to; i++)
            if (batches[i].num_tokens + chunks[c].num_tokens <= CHUNK_TOKENS && batches[i].slots[0] != chunks[c].slot &&
                share_projections(d, batches[i].slots[0], chunks[c].slot))
                to = batches + i;
        if (!to) {
            to = batches + num_batches++;
            to->num_tokens = 0;
        }
        for (int64_t t = 0; t < chunks[c].num_tokens; t++, to->num_tokens++) {
            to->slots[to->num_tokens] = chunks[c].slot;
            to->tokens[to->num_tokens] = chunks[c].first + t;
        }
    }
    return num_batches;
}

int64_t native_chunk_tokens(void) { return CHUNK_TOKENS; }

/* y: (T, outputs), x: (T, num_in), rows y_stride and x_stride floats apart; gates: (T, num_experts) or null; chunks: at most
   CHUNK_TOKENS tokens each, of one slot. max_rank: the largest rank among the slots. */
void native_apply_deltas(float *y, const float *x, const float *gates, const void *slots, const void *members,
                         const void *chunks, int64_t num_chunks, int64_t num_members, int64_t num_in, int64_t y_stride,
                         int64_t x_stride, int64_t num_experts, int64_t max_rank, int num_threads) {
    batch *batches = malloc((size_t)num_chunks * sizeof(batch));
    deltas d = {y, x, gates, slots, members, batches, num_members, num_in, y_stride, x_stride, num_experts, max_rank};
    run_items(apply_batch, &d, gather_batches(batches, &d, chunks, num_chunks) * num_members, num_threads);
    free(batches);
}
