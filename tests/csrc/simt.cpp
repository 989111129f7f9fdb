// What a thread of the shim calls. What it tells a sanitizer it says as the fiber that it is; what it changes, it
// changes in the scheduler.
#include "simt_scheduler.h"

namespace fastkd::simt {

const Thread* self;

void run(const Grid& grid, void (*kernel)(const void*), const void* closure) {
    struct sigaction action = {}, before;
    action.sa_sigaction = segmentation_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &before);
    Scheduler one(grid, kernel, closure);
    scheduler = &one;
    one.run();
    sigaction(SIGSEGV, &before, nullptr);
}

void* shared(int line, size_t bytes) {
    void* memory;
    scheduler->enter([&] { memory = scheduler->running->block.variable(line, bytes); });
    return memory;
}

char* dynamic_shared() { return static_cast<char*>(shared(kDynamic, 0)); }

uint32_t shuffle(uint32_t x, int lane) {
    Fiber& fiber = *scheduler->running;
    scheduler->enter([&] {
        Warp& warp = fiber.block.warps[fiber.thread.rank / kWarpSize];
        warp.values[fiber.thread.rank % kWarpSize] = x;
        fiber.lane = lane;
        scheduler->wait(warp.shuffle.waiting);
        if (!warp.shuffle.is_last()) return;
        for (Fiber* one : warp.shuffle.waiting) one->shuffled = warp.values[one->lane];
        scheduler->wake(warp.shuffle.waiting);
    });
    return fiber.shuffled;
}

void cluster_arrive() {
    Fiber& fiber = *scheduler->running;
    Collective& all = fiber.block.cluster.all;
    scheduler->pause();
    release(&all.tokens[all.phase % 2]);
    scheduler->enter([&] {
        if (fiber.arrived >= 0) fail("a thread arrives twice at the cluster's barrier");
        fiber.arrived = all.phase;
        if (all.is_last()) scheduler->wake(all.waiting);
    });
}

void cluster_wait() {
    Fiber& fiber = *scheduler->running;
    Collective& all = fiber.block.cluster.all;
    const int64_t phase = fiber.arrived;
    scheduler->pause();
    scheduler->enter([&] {
        if (phase < 0) fail("a thread waits at the cluster's barrier without having arrived");
        fiber.arrived = -1;
        if (all.phase == phase) scheduler->wait(all.waiting);
    });
    acquire(&all.tokens[phase % 2]);
}

static void barrier(Collective& all) {
    scheduler->pause();
    char* const token = &all.tokens[all.phase % 2];
    release(token);
    scheduler->enter([&] {
        if (all.is_last()) return scheduler->wake(all.waiting);
        scheduler->wait(all.waiting);
    });
    acquire(token);
}

void block_barrier() { barrier(scheduler->running->block.all); }

void copy_async(void* shared, const void* global) {
    Fiber& fiber = *scheduler->running;
    writes(shared, 16);
    reads(global, 16);
    scheduler->enter([&] {
        if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
            fail("a copy of 16 bytes from %p to %p", global, shared);
        scheduler->locate(shared, fiber.block.rank);
        __builtin_memset(shared, 0xff, 16);
        fiber.copies.push_back({shared, global});
    });
}

void copy_async_wait() {
    Fiber& fiber = *scheduler->running;
    scheduler->pause();
    scheduler->enter([&] {
        for (const Copy& copy : fiber.copies) __builtin_memcpy(copy.shared, copy.global, 16);
    });
    for (const Copy& copy : fiber.copies) {
        writes(copy.shared, 16);
        reads(copy.global, 16);
    }
    scheduler->enter([&] { fiber.copies.clear(); });
}

void barrier_init(Barrier* barrier, int arrivals) {
    writes(barrier, sizeof(Barrier));
    scheduler->enter([&] {
        Block& block = scheduler->running->block;
        block.barriers.insert_or_assign(scheduler->locate(barrier, block.rank), Transactions{arrivals, arrivals});
    });
}

void barrier_expect(Barrier* barrier, int bytes) {
    char* token;
    scheduler->pause();
    scheduler->enter([&] { token = scheduler->token(); });
    reads(barrier, sizeof(Barrier));
    release(token);
    scheduler->enter([&] {
        Transactions& t = scheduler->running->block.transactions(barrier);
        if (!t.pending) fail("more arrivals at a barrier than it was initialised for");
        --t.pending;
        t.bytes += bytes;
        t.tokens[t.phase % 2].push_back(token);
        scheduler->advance(t);
    });
}

void barrier_wait(Barrier* barrier, int parity) {
    Fiber& fiber = *scheduler->running;
    scheduler->pause();
    reads(barrier, sizeof(Barrier));
    scheduler->enter([&] {
        Transactions& t = fiber.block.transactions(barrier);
        if (t.phase % 2 == parity) return scheduler->wait(t.waiting);
        fiber.tokens = t.tokens[(t.phase + 1) % 2];
    });
    for (char* token : fiber.tokens) acquire(token);
}

void store_async(void* local, int rank, const void* value, int bytes, Barrier* local_barrier) {
    Store store;
    scheduler->pause();
    scheduler->enter([&] {
        store.block = scheduler->running->block.cluster.blocks[rank];
        store.to = scheduler->locate(local, rank);
        store.barrier = scheduler->locate(local_barrier, rank);
        store.block.lock()->transactions(store.barrier);
        store.token = scheduler->token();
        store.bytes = bytes;
        for (int i = 0; 4 * i < bytes; ++i) store.words[i] = static_cast<const uint32_t*>(value)[i];
    });
    writes(store.to, bytes);
    reads(store.barrier, sizeof(Barrier));
    release(store.token);
    scheduler->enter([&] { scheduler->stores.push_back(std::move(store)); });
}

void global_arrive(uint32_t* arrived) {
    scheduler->pause();
    release(arrived);
    scheduler->enter([&] {
        ++*arrived;
        scheduler->wake(scheduler->counting[arrived]);
    });
}

void global_wait(const uint32_t* arrived, int count) {
    scheduler->pause();
    for (bool waits = true; waits;) {
        scheduler->enter([&] {
            waits = *arrived < static_cast<uint32_t>(count);
            if (waits) scheduler->wait(scheduler->counting[arrived]);
        });
    }
    acquire(const_cast<uint32_t*>(arrived));
}

}  // namespace fastkd::simt
