/* y = x W^T + bias in float32, for few rows x and a weight packed once.

   The weight lies in panels of PANEL outputs: panel p holds, input after input, its PANEL numbers, so that one pass reads
   memory in order and needs no sum across lanes. A tile of TILE_ROWS rows by three vectors stays in registers.
   Source of the scheme: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008, section 4. */
#include "common.h"

#define WIDTH 3 /* vectors per panel; with TILE_ROWS it fills the registers */
#define PANEL (WIDTH * LANES)
#define CHUNK 4 /* panels per item: long runs of memory for one core */

typedef struct {
    float *y;
    const float *x, *weight, *bias;
    int64_t num_rows, num_in, num_out, y_stride, x_stride;
} product;

int64_t native_panel_f32(void) { return PANEL; }

#define TILE(ROWS)                                                                                                    \
    static void tile_##ROWS(const product *p, int64_t row, int64_t panel) {                                          \
        vec sums[ROWS][WIDTH];                                                                                        \
        const float *weight = p->weight + panel * p->num_in * PANEL;                                                  \
        const float *x = p->x + row * p->x_stride;                                                                    \
        for (int m = 0; m < ROWS; m++)                                                                                \
            for (int v = 0; v < WIDTH; v++) sums[m][v] = splat(0);                                                    \
        for (int64_t k = 0; k < p->num_in; k++, weight += PANEL) {                                                    \
            vec columns[WIDTH];                                                                                       \
            for (int v = 0; v < WIDTH; v++) columns[v] = load(weight + v * LANES);                                    \
            for (int m = 0; m < ROWS; m++) {                                                                          \
                vec input = splat(x[m * p->x_stride + k]);                                                            \
                for (int v = 0; v < WIDTH; v++) sums[m][v] += columns[v] * input;                                     \
            }                                                                                                         \
        }                                                                                                             \
        int64_t first = panel * PANEL, num_left = MIN(PANEL, p->num_out - first);                                     \
        for (int m = 0; m < ROWS; m++) {                                                                              \
            float *y = p->y + (row + m) * p->y_stride + first;                                                        \
            float found[PANEL];                                                                                       \
            for (int v = 0; v < WIDTH; v++) store(found + v * LANES, sums[m][v]);                                     \
            for (int64_t i = 0; i < num_left; i++) y[i] = found[i] + (p->bias ? p->bias[first + i] : 0);              \
        }                                                                                                             \
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

static void run_tile(const product *p, int64_t row, int64_t num_rows, int64_t panel) {
    switch (num_rows) {
        case 1: tile_1(p, row, panel); break;
        case 2: tile_2(p, row, panel); break;
        case 3: tile_3(p, row, panel); break;
        case 4: tile_4(p, row, panel); break;
#if TILE_ROWS == 8
        case 5: tile_5(p, row, panel); break;
        case 6: tile_6(p, row, panel); break;
        case 7: tile_7(p, row, panel); break;
        case 8: tile_8(p, row, panel); break;
#endif
    }
}

static void run_panels(void *job, int64_t item) {
    const product *p = job;
    int64_t num_panels = CEIL_DIV(p->num_out, PANEL);
    for (int64_t panel = item * CHUNK; panel < MIN((item + 1) * CHUNK, num_panels); panel++)
        for (int64_t row = 0; row < p->num_rows; row += TILE_ROWS)
            run_tile(p, row, MIN(TILE_ROWS, p->num_rows - row), panel);
}

/* x: (num_rows, num_in), y: (num_rows, num_out), rows x_stride and y_stride floats apart; bias: (num_out,) or null. */
void native_gemm_f32(float *y, const float *x, const float *weight, const float *bias, int64_t num_rows, int64_t num_in,
                     int64_t num_out, int64_t y_stride, int64_t x_stride, int num_threads) {
    product p = {y, x, weight, bias, num_rows, num_in, num_out, y_stride, x_stride};
    run_items(run_panels, &p, CEIL_DIV(CEIL_DIV(num_out, PANEL), CHUNK), num_threads);
}
