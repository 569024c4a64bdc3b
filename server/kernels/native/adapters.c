/* What adapters add to the linears of one group: low rank, diagonals and gates, for many segments in one call.

   For token t of a chunk that uses slot z:
       y[t] = out_scale * (y[t] + delta_scale * (B ((A x[t]) * rank_scale * gate[t]))) + out_shift
   at each slot's own rank. Source of batching by segments: Punica, https://arxiv.org/abs/2310.18547. */
#include "segments.h"

#define CHUNK_TOKENS 8
#define SHRINK_RANKS 4
#define SPAN 4 /* vectors of outputs that one pass of the expansion holds */
#define AHEAD 4 /* rows of B to ask for before they are needed: they lie a stride apart, where no prefetcher follows */

typedef struct {
    float *y;
    const float *x, *gates;
    const slot_weights *slots; /* [slot][member] */
    const member *members;
    const chunk *chunks;
    int64_t num_members, num_in, y_stride, x_stride, num_experts, max_rank;
} deltas;

/* v[t] = A x[t] for two tokens (or one) and SHRINK_RANKS rows of A (or fewer); every sum runs over its inputs in order. */
#define SHRINK(RANKS, TOKENS)                                                                                         \
    static void shrink_##RANKS##_##TOKENS(float *v, int64_t v_stride, const float *a, int64_t a_stride, const float *x, \
                                          int64_t x_stride, int64_t num_in) {                                        \
        vec sums[RANKS][TOKENS];                                                                                      \
        for (int r = 0; r < RANKS; r++)                                                                               \
            for (int t = 0; t < TOKENS; t++) sums[r][t] = splat(0);                                                   \
        int64_t k = 0;                                                                                                \
        for (; k + LANES <= num_in; k += LANES)                                                                       \
            for (int r = 0; r < RANKS; r++) {                                                                         \
                vec row = load(a + r * a_stride + k);                                                                 \
                for (int t = 0; t < TOKENS; t++) sums[r][t] += row * load(x + t * x_stride + k);                      \
            }                                                                                                         \
        for (int r = 0; r < RANKS; r++)                                                                               \
            for (int t = 0; t < TOKENS; t++) {                                                                        \
                float sum = lane_sum(sums[r][t]);                                                                     \
                for (int64_t i = k; i < num_in; i++) sum += a[r * a_stride + i] * x[t * x_stride + i];                \
                v[t * v_stride + r] = sum;                                                                            \
            }                                                                                                         \
    }
SHRINK(4, 2)
SHRINK(4, 1)
SHRINK(8, 1)
SHRINK(1, 1)

static void shrink(float *v, const deltas *d, const slot_weights *w, int64_t first, int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; t += 2) {
        int pair = t + 1 < num_tokens;
        const float *x = d->x + (first + t) * d->x_stride;
        float *to = v + t * d->max_rank;
        int64_t r = 0;
        for (; !pair && r + 8 <= w->rank; r += 8)
            shrink_8_1(to + r, d->max_rank, w->a + r * w->a_stride, w->a_stride, x, d->x_stride, d->num_in);
        for (; r + SHRINK_RANKS <= w->rank; r += SHRINK_RANKS)
            (pair ? shrink_4_2 : shrink_4_1)(to + r, d->max_rank, w->a + r * w->a_stride, w->a_stride, x, d->x_stride,
                                             d->num_in);
        for (; r < w->rank; r++)
            for (int i = 0; i <= pair; i++)
                shrink_1_1(to + i * d->max_rank + r, d->max_rank, w->a + r * w->a_stride, w->a_stride,
                           x + i * d->x_stride, d->x_stride, d->num_in);
    }
}

static void scale_ranks(float *v, const deltas *d, const slot_weights *w, int64_t first, int64_t num_tokens) {
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t r = 0; r < w->rank; r++) {
            float *value = v + t * d->max_rank + r;
            if (w->rank_scale) *value *= w->rank_scale[r];
            if (w->expert_of_rank && d->gates) *value *= d->gates[(first + t) * d->num_experts + w->expert_of_rank[r]];
        }
}

/* Finish `count` outputs from column o on: y = out_scale * (y + delta_scale * delta) + out_shift. */
INLINE void finish(float *y, const float *delta, const slot_weights *w, int64_t o, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float value = w->delta_scale ? y[i] + delta[i] * w->delta_scale[o + i] : y[i] + delta[i];
        if (w->out_scale) value *= w->out_scale[o + i];
        if (w->out_shift) value += w->out_shift[o + i];
        y[i] = value;
    }
}

static void expand_span(float *y, const float *v, const slot_weights *w, int64_t o) {
    vec sums[SPAN];
    for (int s = 0; s < SPAN; s++) sums[s] = splat(0);
    const float *b = w->b + o;
    for (int64_t r = 0; r < w->rank; r++, b += w->b_stride) {
        vec value = splat(v[r]);
        for (int s = 0; s < SPAN; s++) {
            __builtin_prefetch(b + AHEAD * w->b_stride + s * LANES);
            sums[s] += load(b + s * LANES) * value;
        }
    }
    float delta[SPAN * LANES];
    for (int s = 0; s < SPAN; s++) store(delta + s * LANES, sums[s]);
    finish(y, delta, w, o, SPAN * LANES);
}

static void expand(const deltas *d, const slot_weights *w, const member *m, const float *v, int64_t first,
                   int64_t num_tokens) {
    int64_t o = 0;
    for (; o + SPAN * LANES <= m->width; o += SPAN * LANES)
        for (int64_t t = 0; t < num_tokens; t++)
            expand_span(d->y + (first + t) * d->y_stride + m->start + o, v + t * d->max_rank, w, o);
    for (; o < m->width; o++)
        for (int64_t t = 0; t < num_tokens; t++) {
            float delta = 0;
            for (int64_t r = 0; r < w->rank; r++) delta += w->b[r * w->b_stride + o] * v[t * d->max_rank + r];
            finish(d->y + (first + t) * d->y_stride + m->start + o, &delta, w, o, 1);
        }
}

static void apply_chunk(void *job, int64_t item) {
    const deltas *d = job;
    const chunk *c = d->chunks + item / d->num_members;
    int64_t index = item % d->num_members;
    const slot_weights *w = d->slots + c->slot * d->num_members + index;
    if (!w->is_used) return;
    float v[CHUNK_TOKENS * d->max_rank + 1];
    shrink(v, d, w, c->first, c->num_tokens);
    if (w->rank_scale || w->expert_of_rank) scale_ranks(v, d, w, c->first, c->num_tokens);
    expand(d, w, d->members + index, v, c->first, c->num_tokens);
}

int64_t native_chunk_tokens(void) { return CHUNK_TOKENS; }

/* y: (T, outputs), x: (T, num_in), rows y_stride and x_stride floats apart; gates: (T, num_experts) or null; chunks: at most
   CHUNK_TOKENS tokens each, of one slot. max_rank: the largest rank among the slots. */
void native_apply_deltas(float *y, const float *x, const float *gates, const void *slots, const void *members,
                         const void *chunks, int64_t num_chunks, int64_t num_members, int64_t num_in, int64_t y_stride,
                         int64_t x_stride, int64_t num_experts, int64_t max_rank, int num_threads) {
    deltas d = {y, x, gates, slots, members, chunks, num_members, num_in, y_stride, x_stride, num_experts, max_rank};
    run_items(apply_chunk, &d, num_chunks * num_members, num_threads);
}
