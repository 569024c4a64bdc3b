/* What every kernel here shares: vectors of the machine's width and a parallel loop.

   Vectors use the extension of GCC and Clang, so one source serves AVX-512, AVX2 and NEON. A sum always runs in one order
   that depends on the length alone, never on how many rows there are: a row's result is the same in every batch. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16 /* floats per vector */
#define TILE_ROWS 8
#elif defined(__AVX2__)
#define LANES 8
#define TILE_ROWS 4
#else
#define LANES 4
#define TILE_ROWS 8
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))

INLINE vec splat(float value) { return (vec){0} + value; }
INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }

/* Lane after lane, pairwise: the order is fixed. */
INLINE float lane_sum(vec value) {
    float lanes[LANES];
    store(lanes, value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

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

/* x / (1 + exp(-x)), by the exponential of a negative number on both sides of zero; below -100 it is as good as zero. */
INLINE vec silu_vec(vec x) {
    typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    ivec is_low = x < -100.0f;
    x = (vec)((is_low & (ivec)splat(-100.0f)) | (~is_low & (ivec)x));
    ivec is_negative = x < 0.0f;
    vec small = exp_vec((vec)((ivec)x | INT32_MIN));
    vec top = (vec)((is_negative & (ivec)small) | (~is_negative & (ivec)splat(1.0f)));
    return x * top / (small + 1.0f);
}

/* Memory that will be read soon. A product that is bound by arithmetic asks for it on the side, each item for its share. */
typedef struct {
    const char *from;
    int64_t num_lines; /* of 64 bytes */
} span;

typedef struct {
    const span *spans;
    int64_t offset, num_left; /* lines: into the first span, and of the share */
} share;

INLINE share begin_share(const span *spans, int64_t num_spans, int64_t item, int64_t num_items) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_spans; i++) total += spans[i].num_lines;
    int64_t first = total * item / num_items;
    share s = {spans, first, total * (item + 1) / num_items - first};
    for (; s.num_left && s.offset >= s.spans->num_lines; s.spans++) s.offset -= s.spans->num_lines;
    return s;
}

/* Return the next piece of a share, at most `most` lines up to *end. */
INLINE const char *take_piece(share *s, int64_t most, const char **end) {
    if (!s->num_left) return *end = 0;
    int64_t num_lines = MIN(most, MIN(s->num_left, s->spans->num_lines - s->offset));
    const char *at = s->spans->from + s->offset * 64;
    s->num_left -= num_lines;
    s->offset += num_lines;
    for (; s->num_left && s->offset >= s->spans->num_lines; s->spans++) s->offset -= s->spans->num_lines;
    *end = at + num_lines * 64;
    return at;
}

/* Call work(job, item) for every item below num_items, each once; idle threads take the next item. */
typedef void (*work_item)(void *job, int64_t item);
void run_items(work_item work, void *job, int64_t num_items, int num_threads);
