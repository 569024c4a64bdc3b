/* y = x W^T + bias in float32, for few rows x and a weight packed once.

   The weight lies in panels of PANEL outputs: panel p holds, input after input, its PANEL numbers, so that one pass reads
   memory in order and needs no sum across lanes. A tile of TILE_ROWS rows by three vectors stays in registers.
   A weight whose values are those of NF4 may stay in 4 bits: a block of a panel is unpacked where it is used, into a buffer that
   fits the first cache, to the very same numbers. Source of NF4: https://arxiv.org/abs/2305.14314, section 3.
   While it multiplies, the product asks for memory that its caller will read next.
   Source of the scheme: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008, section 4. */
#include <stdlib.h>

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define WIDTH 3 /* vectors per panel; with TILE_ROWS it fills the registers */
#define PANEL (WIDTH * LANES)
#define BLOCK 64 /* inputs that share a scale in NF4 */

typedef struct {
    float *y;
    const float *x, *weight, *bias;
    const uint8_t *codes; /* of NF4, [panel][pair of inputs][PANEL], the first of a pair in the low half; else null */
    const float *scales, *table; /* of NF4, [panel][block][PANEL] and the 16 numbers */
    const span *ahead;
    int64_t num_ahead;
    int64_t num_rows, num_in, num_out, y_stride, x_stride;
} product;

int64_t native_panel_f32(void) { return PANEL; }

/* sums[m][i] += x[m][k] weight[k][i], in the order of k; x: rows x_stride floats apart, sums: rows of PANEL floats.
   Two lines from `at` to `end` are fetched per input. */
#define TILE(ROWS)                                                                                                    \
    static void tile_##ROWS(float *sums, const float *x, int64_t x_stride, const float *weight, int64_t num_in,      \
                            const char *at, const char *end) {                                                       \
        vec tile[ROWS][WIDTH];                                                                                        \
        for (int m = 0; m < ROWS; m++)                                                                                \
            for (int v = 0; v < WIDTH; v++) tile[m][v] = load(sums + m * PANEL + v * LANES);                          \
        for (int64_t k = 0; k < num_in; k++, weight += PANEL) {                                                       \
            vec columns[WIDTH];                                                                                       \
            if (at < end) {                                                                                           \
                __builtin_prefetch(at, 0, 2);                                                                         \
                __builtin_prefetch(at + 64, 0, 2);                                                                    \
                at += 128;                                                                                            \
            }                                                                                                         \
            for (int v = 0; v < WIDTH; v++) columns[v] = load(weight + v * LANES);                                    \
            for (int m = 0; m < ROWS; m++) {                                                                          \
                vec input = splat(x[m * x_stride + k]);                                                               \
                for (int v = 0; v < WIDTH; v++) tile[m][v] += columns[v] * input;                                     \
            }                                                                                                         \
        }                                                                                                             \
        for (int m = 0; m < ROWS; m++)                                                                                \
            for (int v = 0; v < WIDTH; v++) store(sums + m * PANEL + v * LANES, tile[m][v]);                          \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
#if TILE_ROWS == 8
TILE(5)
TILE(6)
TILE(7)
TILE(8)
#endif

/* The same for any number of rows. */
static void add_products(float *sums, const float *x, int64_t x_stride, const float *weight, int64_t num_in,
                         int64_t num_rows, share *ahead) {
    for (; num_rows > 0; num_rows -= TILE_ROWS, sums += TILE_ROWS * PANEL, x += TILE_ROWS * x_stride) {
        const char *end, *at = take_piece(ahead, 2 * num_in, &end);
        switch (num_rows) {
            case 1: tile_1(sums, x, x_stride, weight, num_in, at, end); break;
            case 2: tile_2(sums, x, x_stride, weight, num_in, at, end); break;
            case 3: tile_3(sums, x, x_stride, weight, num_in, at, end); break;
#if TILE_ROWS == 8
            case 4: tile_4(sums, x, x_stride, weight, num_in, at, end); break;
            case 5: tile_5(sums, x, x_stride, weight, num_in, at, end); break;
            case 6: tile_6(sums, x, x_stride, weight, num_in, at, end); break;
            case 7: tile_7(sums, x, x_stride, weight, num_in, at, end); break;
            default: tile_8(sums, x, x_stride, weight, num_in, at, end);
#else
            default: tile_4(sums, x, x_stride, weight, num_in, at, end);
#endif
        }
    }
}

INLINE void unpack_pair(float *low, float *high, const uint8_t *codes, const float *scales, const float *table) {
#if defined(__AVX512F__)
    __m512 values = _mm512_loadu_ps(table), scale = _mm512_loadu_ps(scales);
    __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)); /* Only 4 bits choose a value. */
    _mm512_storeu_ps(low, _mm512_mul_ps(_mm512_permutexvar_ps(pair, values), scale));
    _mm512_storeu_ps(high, _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), values), scale));
#else
    for (int i = 0; i < LANES; i++) {
        low[i] = table[codes[i] & 15] * scales[i];
        high[i] = table[codes[i] >> 4] * scales[i];
    }
#endif
}

/* Unpack one block of a panel of NF4 to [input][PANEL]. */
INLINE void unpack(float *to, const uint8_t *codes, const float *scales, const float *table) {
    for (int k = 0; k < BLOCK; k += 2, codes += PANEL)
        for (int v = 0; v < PANEL; v += LANES)
            unpack_pair(to + k * PANEL + v, to + (k + 1) * PANEL + v, codes + v, scales + v, table);
}

/* Sums of this thread: they outlive the call, because a fresh page for every panel costs more than the panel. */
static float *borrow_sums(int64_t num_rows) {
    static _Thread_local float *sums;
    static _Thread_local int64_t size;
    if (size < num_rows) {
        free(sums);
        size = num_rows;
        sums = aligned_alloc(64, (size_t)CEIL_DIV(size * PANEL * 4, 64) * 64);
    }
    memset(sums, 0, (size_t)(num_rows * PANEL) * 4);
    return sums;
}

static void run_panel(void *job, int64_t panel) {
    const product *p = job;
    float *sums = borrow_sums(p->num_rows);
    share ahead = begin_share(p->ahead, p->num_ahead, panel, CEIL_DIV(p->num_out, PANEL));
    if (p->codes) {
        float block[BLOCK * PANEL] __attribute__((aligned(64)));
        for (int64_t first = 0; first < p->num_in; first += BLOCK) {
            int64_t place = panel * p->num_in + first;
            unpack(block, p->codes + place / 2 * PANEL, p->scales + place / BLOCK * PANEL, p->table);
            add_products(sums, p->x + first, p->x_stride, block, BLOCK, p->num_rows, &ahead);
        }
    } else {
        add_products(sums, p->x, p->x_stride, p->weight + panel * p->num_in * PANEL, p->num_in, p->num_rows,
                     &ahead);
    }
    int64_t first = panel * PANEL, num_left = MIN(PANEL, p->num_out - first);
    for (int64_t row = 0; row < p->num_rows; row++) {
        float *y = p->y + row * p->y_stride + first;
        for (int64_t i = 0; i < num_left; i++) y[i] = sums[row * PANEL + i] + (p->bias ? p->bias[first + i] : 0);
    }
}

/* x: (num_rows, num_in), y: (num_rows, num_out), rows x_stride and y_stride floats apart; bias: (num_out,) or null. */
void native_gemm_f32(float *y, const float *x, const float *weight, const float *bias, int64_t num_rows, int64_t num_in,
                     int64_t num_out, int64_t y_stride, int64_t x_stride, int num_threads) {
    product p = {y, x, weight, bias, 0, 0, 0, 0, 0, num_rows, num_in, num_out, y_stride, x_stride};
    run_items(run_panel, &p, CEIL_DIV(num_out, PANEL), num_threads);
}

/* The same with a weight in NF4; BLOCK divides num_in. ahead: num_ahead pairs of an address and a number of lines, what to
   fetch meanwhile. */
void native_gemm_nf4(float *y, const float *x, const uint8_t *codes, const float *scales, const float *table,
                     const float *bias, const void *ahead, int64_t num_ahead, int64_t num_rows, int64_t num_in,
                     int64_t num_out, int64_t y_stride, int64_t x_stride, int num_threads) {
    product p = {y, x, 0, bias, codes, scales, table, ahead, num_ahead, num_rows, num_in, num_out, y_stride, x_stride};
    run_items(run_panel, &p, CEIL_DIV(num_out, PANEL), num_threads);
}
