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

/* Call work(job, item) for every item below num_items, each once; idle threads take the next item. */
typedef void (*work_item)(void *job, int64_t item);
void run_items(work_item work, void *job, int64_t num_items, int num_threads);
