/* The parallel loop: a pool of threads that take items beside the caller. Knows no tensors.

   The caller never waits for a thread that has not begun: on a busy machine it does the items itself, where a barrier of
   OpenMP would stand still until the last thread has got a core. Threads watch for work for a moment, then sleep. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"

#define MAX_THREADS 64
/* Some 100 microseconds of watching, then some 5 milliseconds of watching while others may have the core: a step has a
   product every 0.2 milliseconds, and a sleeping virtual processor takes as long to wake as a product takes. */
#define WATCH_ROUNDS 2000
#define YIELD_ROUNDS 10000

typedef struct {
    work_item work;
    void *job;
    int64_t num_items, next;
    int num_helpers;
} loop;

static loop current;       /* What `ticket` invites to; written only while it is even. */
static uint32_t ticket;    /* Odd while threads may join; every change is a new value. */
static int32_t num_inside; /* Threads that joined, or look whether they may. */
static int32_t num_asleep;
static int num_started;
static pid_t owner;
static pthread_mutex_t is_busy = PTHREAD_MUTEX_INITIALIZER;

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void drain(loop *self) {
    int64_t item;
    while ((item = __atomic_fetch_add(&self->next, 1, __ATOMIC_RELAXED)) < self->num_items) self->work(self->job, item);
}

static uint32_t await_change(uint32_t seen) {
    for (int round = 0; round < WATCH_ROUNDS + YIELD_ROUNDS; round++) {
        uint32_t now = __atomic_load_n(&ticket, __ATOMIC_ACQUIRE);
        if (now != seen && now % 2) return now;
        if (round < WATCH_ROUNDS)
            pause_briefly();
        else
            sched_yield();
    }
    for (;;) {
        uint32_t now = __atomic_load_n(&ticket, __ATOMIC_SEQ_CST);
        if (now != seen && now % 2) return now;
        __atomic_fetch_add(&num_asleep, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &ticket, FUTEX_WAIT_PRIVATE, now, 0, 0, 0);
        __atomic_fetch_sub(&num_asleep, 1, __ATOMIC_SEQ_CST);
    }
}

static void *help(void *number) {
    uint32_t seen = 0;
    for (;;) {
        seen = await_change(seen);
        __atomic_fetch_add(&num_inside, 1, __ATOMIC_SEQ_CST);
        /* The caller closes the loop before it looks who is inside: either it sees this thread, or this thread sees that. */
        if (__atomic_load_n(&ticket, __ATOMIC_SEQ_CST) == seen && (intptr_t)number < current.num_helpers) drain(&current);
        __atomic_fetch_sub(&num_inside, 1, __ATOMIC_RELEASE);
    }
    return 0;
}

/* Start threads that are missing; those of a parent process do not exist here. */
static int start_threads(int num_wanted) {
    if (owner != getpid()) {
        owner = getpid();
        num_started = 0;
        num_inside = num_asleep = 0;
    }
    for (; num_started < MIN(num_wanted, MAX_THREADS); num_started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)num_started)) break;
        pthread_detach(thread);
    }
    return MIN(num_wanted, num_started);
}

void run_items(work_item work, void *job, int64_t num_items, int num_threads) {
    loop alone = {work, job, num_items, 0, 0};
    int num_wanted = (int)MIN((int64_t)num_threads, num_items) - 1;
    if (num_wanted < 1 || pthread_mutex_trylock(&is_busy)) {
        drain(&alone);
        return;
    }
    current = alone;
    current.num_helpers = start_threads(num_wanted);
    __atomic_fetch_add(&ticket, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&num_asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &ticket, FUTEX_WAKE_PRIVATE, MAX_THREADS, 0, 0, 0);
    drain(&current);
    __atomic_fetch_add(&ticket, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&num_inside, __ATOMIC_SEQ_CST)) pause_briefly();
    pthread_mutex_unlock(&is_busy);
}
