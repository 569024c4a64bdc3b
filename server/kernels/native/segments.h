/* How the segments of a step and the slots of a group are described, and how their memory is asked for ahead of time. */
#pragma once
#include "common.h"

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

/* What apply_deltas will read after the product of the base. */
typedef struct {
    const slot_weights *slots; /* [slot][member] */
    const member *members;
    const chunk *chunks;
    int64_t num_chunks, num_members, num_in;
} upcoming;

/* A place in that memory. Two ranges per chunk and member: A, then B. */
typedef struct {
    const upcoming *from;
    const char *at;
    int64_t range, lines_left, budget;
} fetcher;

#define LINE 64 /* bytes */

/* Lines of one range: none for a slot that an earlier chunk named, nor for projections that many slots share. */
INLINE int64_t range_lines(const upcoming *u, int64_t range, const char **at) {
    int64_t index = range / 2, number = index / u->num_members;
    if (number > 0 && u->chunks[number].slot == u->chunks[number - 1].slot) return 0;
    const slot_weights *w = u->slots + u->chunks[number].slot * u->num_members + index % u->num_members;
    int64_t width = range % 2 ? u->members[index % u->num_members].width : u->num_in;
    int64_t stride = range % 2 ? w->b_stride : w->a_stride;
    if (!w->is_used || stride != width) return 0;
    *at = (const char *)(range % 2 ? w->b : w->a);
    return CEIL_DIV(w->rank * width * 4, LINE);
}

INLINE int64_t count_lines(const upcoming *u) {
    const char *at;
    int64_t total = 0;
    for (int64_t range = 0; range < u->num_chunks * u->num_members * 2; range++) total += range_lines(u, range, &at);
    return total;
}

/* Begin at line `skip` with `budget` lines to ask for. */
INLINE fetcher begin_fetching(const upcoming *u, int64_t skip, int64_t budget) {
    fetcher f = {u, 0, -1, 0, budget};
    while (budget > 0) {
        f.lines_left = range_lines(u, ++f.range, &f.at);
        if (skip < f.lines_left) break;
        skip -= f.lines_left;
    }
    f.at += skip * LINE;
    f.lines_left -= skip;
    return f;
}

/* Ask for the next `count` lines, for the second-level cache. */
INLINE void fetch(fetcher *f, int count) {
    for (int i = 0; i < count && f->budget > 0; i++, f->budget--) {
        while (f->lines_left == 0) f->lines_left = range_lines(f->from, ++f->range, &f->at);
        __builtin_prefetch(f->at, 0, 2);
        f->at += LINE;
        f->lines_left--;
    }
}
