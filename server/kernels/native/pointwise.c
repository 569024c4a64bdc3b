/* What a decoder layer does between its products, row by row: norms, the gated activation, rotary positions.

   Sources: https://arxiv.org/abs/1910.07467, section 4 (norm); https://arxiv.org/abs/2002.05202, section 2 (SwiGLU);
   https://arxiv.org/abs/2104.09864, section 3.4.2 (rotation), with the halves of a head as pairs, as transformers has them. */
#include <math.h>

#include "common.h"

#define ROWS_PER_ITEM 8

typedef struct {
    float *y, *sum;
    const float *x, *delta, *weight;
    int64_t num_rows, width;
    float epsilon;
} norm;

static void norm_row(const norm *n, int64_t row) {
    int64_t width = n->width, i = 0;
    const float *x = n->x + row * width;
    float *y = n->y + row * width;
    if (n->delta) {
        const float *delta = n->delta + row * width;
        float *sum = n->sum + row * width;
        for (int64_t o = 0; o < width; o++) sum[o] = x[o] + delta[o];
        x = sum;
    }
    vec squares[4] = {{0}};
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int s = 0; s < 4; s++) squares[s] += load(x + i + s * LANES) * load(x + i + s * LANES);
    float total = lane_sum(squares[0] + squares[1] + (squares[2] + squares[3]));
    for (int64_t rest = i; rest < width; rest++) total += x[rest] * x[rest];
    float factor = 1.0f / sqrtf(total / (float)width + n->epsilon);
    for (i = 0; i < width; i++) y[i] = x[i] * factor * n->weight[i];
}

static void norm_rows(void *job, int64_t item) {
    const norm *n = job;
    for (int64_t row = item * ROWS_PER_ITEM; row < MIN((item + 1) * ROWS_PER_ITEM, n->num_rows); row++) norm_row(n, row);
}

/* y = s / sqrt(mean(s^2) + epsilon) * weight with s = x, or s = sum = x + delta when delta is not null.
   x, y, delta, sum: (num_rows, width), contiguous; weight: (width,). */
void native_rms_norm(float *y, float *sum, const float *x, const float *delta, const float *weight, int64_t num_rows,
                     int64_t width, float epsilon, int num_threads) {
    norm n = {y, sum, x, delta, weight, num_rows, width, epsilon};
    run_items(norm_rows, &n, CEIL_DIV(num_rows, ROWS_PER_ITEM), num_threads);
}

typedef struct {
    float *y;
    const float *x;
    int64_t num_rows, width;
} activation;

static void activate_rows(void *job, int64_t item) {
    const activation *a = job;
    for (int64_t row = item * ROWS_PER_ITEM; row < MIN((item + 1) * ROWS_PER_ITEM, a->num_rows); row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *y = a->y + row * a->width;
        int64_t i = 0;
        for (; i + LANES <= a->width; i += LANES) store(y + i, silu_vec(load(gate + i)) * load(up + i));
        for (; i < a->width; i++) y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* y = silu(gate) * up; x: (num_rows, 2 width), gate first; y: (num_rows, width). */
void native_silu_product(float *y, const float *x, int64_t num_rows, int64_t width, int num_threads) {
    activation a = {y, x, num_rows, width};
    run_items(activate_rows, &a, CEIL_DIV(num_rows, ROWS_PER_ITEM), num_threads);
}

typedef struct {
    float *x;
    const float *cosines, *sines;
    int64_t num_rows, num_heads, dim, rotary_dim, stride;
} rotation;

static void rotate_rows(void *job, int64_t item) {
    const rotation *r = job;
    int64_t half = r->rotary_dim / 2;
    for (int64_t row = item * ROWS_PER_ITEM; row < MIN((item + 1) * ROWS_PER_ITEM, r->num_rows); row++) {
        const float *cosine = r->cosines + row * r->rotary_dim, *sine = r->sines + row * r->rotary_dim;
        for (int64_t head = 0; head < r->num_heads; head++) {
            float *first = r->x + row * r->stride + head * r->dim, *second = first + half;
            for (int64_t i = 0; i < half; i++) {
                float a = first[i], b = second[i];
                first[i] = a * cosine[i] - b * sine[i];
                second[i] = b * cosine[half + i] + a * sine[half + i];
            }
        }
    }
}

/* Rotate the first rotary_dim numbers of num_heads heads of dim numbers, in place; x: rows stride floats apart;
   cosines, sines: (num_rows, rotary_dim). */
void native_rotate(float *x, const float *cosines, const float *sines, int64_t num_rows, int64_t num_heads, int64_t dim,
                   int64_t rotary_dim, int64_t stride, int num_threads) {
    rotation r = {x, cosines, sines, num_rows, num_heads, dim, rotary_dim, stride};
    run_items(rotate_rows, &r, CEIL_DIV(num_rows, ROWS_PER_ITEM), num_threads);
}
