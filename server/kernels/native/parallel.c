/* The parallel loop. Knows no tensors. */
#include "common.h"

parallel_region native_parallel = 0;

void native_set_parallel(void *region) { native_parallel = (parallel_region)region; }

typedef struct {
    work_item work;
    void *job;
    int64_t num_items;
    int64_t next;
} loop;

static void drain(void *data) {
    loop *self = data;
    int64_t item;
    while ((item = __atomic_fetch_add(&self->next, 1, __ATOMIC_RELAXED)) < self->num_items) self->work(self->job, item);
}

void run_items(work_item work, void *job, int64_t num_items, int num_threads) {
    loop self = {work, job, num_items, 0};
    num_threads = (int)MIN((int64_t)num_threads, num_items);
    if (num_threads > 1 && native_parallel)
        native_parallel(drain, &self, (unsigned)num_threads, 0);
    else
        drain(&self);
}
