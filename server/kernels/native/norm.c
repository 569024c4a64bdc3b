/* Root-mean-square normalisation of rows: y = x / sqrt(mean(x^2) + epsilon) * weight.
   Source: https://arxiv.org/abs/1910.07467, section 4. */
#include <math.h>

#include "common.h"

/* x, y: (num_rows, width), contiguous; weight: (width,). */
void native_rms_norm(float *y, const float *x, const float *weight, int64_t num_rows, int64_t width, float epsilon) {
    for (int64_t row = 0; row < num_rows; row++, x += width, y += width) {
        vec squares[4] = {{0}};
        int64_t i = 0;
        for (; i + 4 * LANES <= width; i += 4 * LANES)
            for (int s = 0; s < 4; s++) squares[s] += load(x + i + s * LANES) * load(x + i + s * LANES);
        float sum = lane_sum(squares[0] + squares[1] + (squares[2] + squares[3]));
        for (int64_t rest = i; rest < width; rest++) sum += x[rest] * x[rest];
        float factor = 1.0f / sqrtf(sum / (float)width + epsilon);
        for (i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
    }
}
