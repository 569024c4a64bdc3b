/* y = x W^T + bias with 8-bit integers: weights once, activations at every call, both in blocks of BLOCK inputs.

   A weight w is stored as the unsigned byte round(w / scale) + 128, an activation as the signed byte round(x / scale), each
   with its own float32 scale per block; products are summed exactly in 32 bits, blocks in float32 and in order. The 128 is
   taken back through the sum of the block's activations, which is why weights may be unsigned (the VNNI product wants one
   unsigned side). Block-wise scales: https://arxiv.org/abs/2208.07339 describes why one scale per row is not enough. */
#include "common.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#define BLOCK 64
#define QUADS (BLOCK / 4)
#define OUTPUTS 16 /* one 512-bit vector of 32-bit sums */
#define WIDTH 2
#define PANEL (WIDTH * OUTPUTS)
#define ROWS 8
#define LINES 4 /* fetched ahead per quad */

typedef int32_t sums16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vec16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t codes16 __attribute__((vector_size(16)));

int64_t native_panel_int8(void) { return PANEL; }
int64_t native_block_int8(void) { return BLOCK; }
int native_has_vnni(void) {
#if defined(__AVX512VNNI__)
    return 1;
#else
    return 0;
#endif
}

/* sums[o] += the four products of weights[4 o ..] and the four activations. */
INLINE sums16 add_products(sums16 sums, const uint8_t *weights, const int8_t *activations) {
#if defined(__AVX512VNNI__)
    int32_t four;
    memcpy(&four, activations, 4);
    return (sums16)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
#else
    for (int o = 0; o < OUTPUTS; o++)
        for (int i = 0; i < 4; i++) sums[o] += (int32_t)weights[4 * o + i] * activations[i];
    return sums;
#endif
}

typedef struct {
    int8_t *codes;
    float *scales;
    int32_t *offsets; /* -128 times the sum of the block's codes */
    const float *x;
    int64_t num_in, x_stride;
} quantization;

/* Quantize one block; returns the sum of its codes. Adding 1.5 * 2^23 rounds to the nearest integer in the low bits. */
INLINE int32_t quantize_block(int8_t *codes, float *scale, const float *x) {
    vec16 values[BLOCK / 16], largest = {0}, taint = {0}; /* taint: zero, or NaN when a value is not finite */
    for (int v = 0; v < BLOCK / 16; v++) {
        values[v] = *(const vec16 *)(x + v * 16);
        vec16 size = (vec16)((sums16)values[v] & 0x7fffffff);
        sums16 is_larger = size > largest;
        largest = (vec16)((is_larger & (sums16)size) | (~is_larger & (sums16)largest));
        taint += values[v] * 0;
    }
    float most = 0, tainted = 0;
    for (int i = 0; i < 16; i++) {
        most = largest[i] > most ? largest[i] : most;
        tainted += taint[i];
    }
    *scale = most / 127.0f + tainted;
    float inverse = *scale > 0 ? 127.0f / most : 0;
    sums16 sum = {0};
    for (int v = 0; v < BLOCK / 16; v++) {
        sums16 found = (sums16)(values[v] * inverse + 12582912.0f) - 0x4B400000;
        codes16 narrow = __builtin_convertvector(found, codes16);
        memcpy(codes + v * 16, &narrow, 16);
        sum += __builtin_convertvector(narrow, sums16);
    }
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += sum[i];
    return total;
}

static void quantize_row(void *job, int64_t row) {
    const quantization *q = job;
    int64_t num_blocks = q->num_in / BLOCK;
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t at = row * num_blocks + block;
        q->offsets[at] = -128 * quantize_block(q->codes + at * BLOCK, q->scales + at, q->x + row * q->x_stride + block * BLOCK);
    }
}

/* x: (num_rows, num_in), rows x_stride floats apart; codes (num_rows, num_in); scales, offsets (num_rows, blocks). A row
   with a value that is not finite gets scales that are not, so that it stays visible. */
void native_quantize_rows(int8_t *codes, float *scales, int32_t *offsets, const float *x, int64_t num_rows, int64_t num_in,
                          int64_t x_stride, int num_threads) {
    quantization q = {codes, scales, offsets, x, num_in, x_stride};
    run_items(quantize_row, &q, num_rows, num_rows < 16 ? 1 : num_threads);
}

typedef struct {
    float *y;
    const int8_t *codes;
    const float *scales, *weight_scales, *bias;
    const int32_t *offsets;
    const uint8_t *weight; /* [panel][block][quad][WIDTH][OUTPUTS][4] */
    const span *ahead;
    int64_t num_ahead, num_rows, num_in, num_out, y_stride;
} product;

INLINE void run_tile(const product *p, int64_t row, int64_t num_rows, int64_t panel, share *ahead) {
    int64_t num_blocks = p->num_in / BLOCK;
    vec16 totals[ROWS][WIDTH];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < WIDTH; v++) totals[m][v] = (vec16){0};
    const uint8_t *weight = p->weight + panel * p->num_in * PANEL;
    const float *weight_scales = p->weight_scales + panel * num_blocks * PANEL;
    for (int64_t block = 0; block < num_blocks; block++, weight += BLOCK * PANEL, weight_scales += PANEL) {
        sums16 sums[ROWS][WIDTH];
        const char *end, *at = take_piece(ahead, QUADS * LINES, &end);
        for (int m = 0; m < num_rows; m++)
            for (int v = 0; v < WIDTH; v++) sums[m][v] = (sums16){0} + p->offsets[(row + m) * num_blocks + block];
        for (int quad = 0; quad < QUADS; quad++) {
            for (int line = 0; line < LINES && at < end; line++, at += 64) __builtin_prefetch(at, 0, 2);
            for (int m = 0; m < num_rows; m++)
                for (int v = 0; v < WIDTH; v++)
                    sums[m][v] = add_products(sums[m][v], weight + (quad * WIDTH + v) * BLOCK,
                                              p->codes + (row + m) * p->num_in + block * BLOCK + quad * 4);
        }
        for (int m = 0; m < num_rows; m++)
            for (int v = 0; v < WIDTH; v++)
                totals[m][v] += __builtin_convertvector(sums[m][v], vec16) *
                                (*(const vec16 *)(weight_scales + v * OUTPUTS) * p->scales[(row + m) * num_blocks + block]);
    }
    int64_t first = panel * PANEL, num_left = MIN(PANEL, p->num_out - first);
    for (int m = 0; m < num_rows; m++) {
        float found[PANEL], *y = p->y + (row + m) * p->y_stride + first;
        memcpy(found, totals[m], sizeof found);
        for (int64_t i = 0; i < num_left; i++) y[i] = found[i] + (p->bias ? p->bias[first + i] : 0);
    }
}

static void run_panel(void *job, int64_t panel) {
    const product *p = job;
    share ahead = begin_share(p->ahead, p->num_ahead, panel, CEIL_DIV(p->num_out, PANEL));
    int64_t row = 0;
    for (; row + ROWS <= p->num_rows; row += ROWS) run_tile(p, row, ROWS, panel, &ahead);
    for (; row + 2 <= p->num_rows; row += 2) run_tile(p, row, 2, panel, &ahead);
    if (row < p->num_rows) run_tile(p, row, 1, panel, &ahead);
}

/* y: (num_rows, num_out), rows y_stride floats apart; codes, scales, offsets: of native_quantize_rows. ahead: num_ahead
   pairs of an address and a number of lines, what to fetch meanwhile. */
void native_gemm_int8(float *y, const int8_t *codes, const float *scales, const int32_t *offsets, const uint8_t *weight,
                      const float *weight_scales, const float *bias, const void *ahead, int64_t num_ahead,
                      int64_t num_rows, int64_t num_in, int64_t num_out, int64_t y_stride, int num_threads) {
    product p = {y, codes, scales, weight_scales, bias, offsets, weight, ahead, num_ahead, num_rows, num_in, num_out,
                 y_stride};
    run_items(run_panel, &p, CEIL_DIV(num_out, PANEL), num_threads);
}
