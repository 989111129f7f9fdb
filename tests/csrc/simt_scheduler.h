// The scheduler behind simt.h: memory, threads and the order in which they run. All of its state is its own: a fiber
// enters it as a program enters an operating system. It is compiled without sanitizers, and tells them what it does.
#pragma once

#include "simt.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

extern "C" {
#define SIMT_WEAK __attribute__((weak))
void* __tsan_get_current_fiber() SIMT_WEAK;
void* __tsan_create_fiber(unsigned) SIMT_WEAK;
void __tsan_destroy_fiber(void*) SIMT_WEAK;
void __tsan_switch_to_fiber(void*, unsigned) SIMT_WEAK;
void __tsan_acquire(void*) SIMT_WEAK;
void __tsan_release(void*) SIMT_WEAK;
void __tsan_read_range(void*, unsigned long) SIMT_WEAK;
void __tsan_write_range(void*, unsigned long) SIMT_WEAK;
void __tsan_ignore_thread_begin() SIMT_WEAK;
void __tsan_ignore_thread_end() SIMT_WEAK;
void __sanitizer_start_switch_fiber(void**, const void*, size_t) SIMT_WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) SIMT_WEAK;
}

namespace fastkd::simt {

namespace {

constexpr int kWarpSize = 32;
constexpr size_t kClustersAtOnce = 3;
constexpr size_t kStackBytes = 256 << 10;
constexpr int kDynamic = 0;        // in the place of the line that declares a variable
constexpr unsigned kNoOrder = 1;   // a switch orders nothing, to the thread sanitizer

// What is before the first of two is before what is after the second.
void release(void* token) { if (__tsan_release) __tsan_release(token); }
void acquire(void* token) { if (__tsan_acquire) __tsan_acquire(token); }
void reads(const void* at, size_t bytes) { if (__tsan_read_range) __tsan_read_range(const_cast<void*>(at), bytes); }
void writes(void* at, size_t bytes) { if (__tsan_write_range) __tsan_write_range(at, bytes); }

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::fputs("simt: ", stderr);
    std::vfprintf(stderr, format, arguments);
    if (self) std::fprintf(stderr, "; thread %d of block %d of %d", self->rank, self->block, self->blocks);
    std::fputs("\n", stderr);
    std::abort();
}

// Memory that is NaN in any type, between pages that nobody may touch, and ends where the second of them begins.
class Guarded {
public:
    explicit Guarded(size_t bytes) : bytes(bytes) {
        const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
        mapped = inside + 2 * page;
        base = static_cast<char*>(mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base == MAP_FAILED || mprotect(base + page, inside, PROT_READ | PROT_WRITE)) fail("no memory");
        data = base + page + inside - (bytes + 15) / 16 * 16;
        std::memset(base + page, 0xff, inside);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(base, mapped); }
    bool holds(const void* at) const { return at >= data && at < data + bytes; }

    const size_t bytes;
    char* data;

private:
    char* base;
    size_t mapped;
};

struct Fiber;
using Queue = std::vector<Fiber*>;

// Threads that wait for one another: a barrier's phase after phase.
struct Collective {
    int expected, arrived = 0;
    int64_t phase = 0;
    Queue waiting = {};
    char tokens[2] = {};  // of even and odd phases

    bool is_last() {
        if (++arrived < expected) return false;
        arrived = 0;
        ++phase;
        return true;
    }
};

struct Warp {
    Collective all{kWarpSize}, shuffle{kWarpSize};
    uint32_t values[kWarpSize];
};

// What a Barrier in a block's memory stands for.
struct Transactions {
    int arrivals, pending;
    int64_t bytes = 0, phase = 0;
    Queue waiting = {};
    std::vector<char*> tokens[2] = {};  // of what completed even and odd phases
};

struct Cluster;

struct Block {
    Cluster& cluster;
    const int rank;
    int alive;        // threads
    double priority;
    Collective all{alive};
    std::vector<Warp> warps = std::vector<Warp>(alive / kWarpSize);
    std::map<int, Guarded> variables = {};  // by the line that declares it
    std::map<const void*, Transactions> barriers = {};
    Queue ready = {};

    char* variable(int line, size_t bytes) { return variables.try_emplace(line, bytes).first->second.data; }
    Transactions& transactions(const void* barrier) {
        const auto found = barriers.find(barrier);
        if (found == barriers.end()) fail("a barrier is used before it is initialised");
        return found->second;
    }
};

struct Cluster {
    const int index;
    Collective all;
    std::vector<std::shared_ptr<Block>> blocks;  // null: has not started, or has exited
    std::vector<int> to_start = {};
    int left = 0;  // threads
};

struct Copy {
    void* shared;
    const void* global;
};

struct Store {
    std::weak_ptr<Block> block;
    char *to, *barrier, *token;
    uint32_t words[4];
    int bytes;
};

struct Fiber {
    Thread thread;
    Block& block;
    char* stack;
    void* tsan = nullptr;
    ucontext_t context = {};
    bool waits = false, ended = false;
    int64_t arrived = -1;  // at the cluster's barrier, in this phase
    int lane = 0;                    // of a shuffle, where from; and what came
    uint32_t shuffled = 0;
    std::vector<Copy> copies = {};   // under way
    std::vector<char*> tokens = {};  // of the phase that it has waited for
};

class Scheduler {
public:
    Scheduler(const Grid& grid, void (*kernel)(const void*), const void* closure)
        : grid(grid), kernel(kernel), closure(closure), random(grid.seed) {
        // Seed 0 is the worst order: the last first, whatever is not forced to happen happens last.
        starts = worst() ? 0.0 : chance() < 0.5 ? 0.01 : 0.5;
        deliveries = worst() ? 0.0 : chance() < 0.5 ? 0.01 : 0.5;
        switches = worst() ? 0.0 : chance() < 0.5 ? 0.01 : 0.5;
        for (int i = 0; i < grid.clusters * grid.parts; ++i) to_launch.push_back(i);
        if (!worst()) shuffle(to_launch);
    }

    void run() {
        if (__tsan_get_current_fiber) tsan = __tsan_get_current_fiber();
        if (tsan) __tsan_ignore_thread_begin();  // what the scheduler itself does to memory, allocation too
        while (true) {
            while ((grid.parts > 1 || clusters.size() < kClustersAtOnce) && !to_launch.empty()) launch();
            if (clusters.empty()) break;
            Block* const next = highest();
            if (can_start() && (!next || chance() < starts)) {
                start();
            } else if (!stores.empty() && (!next || chance() < deliveries)) {
                deliver(take(stores));
            } else if (next) {
                resume(*take(next->ready));
            } else {
                nothing_can_run();
            }
        }
        if (!stores.empty()) fail("stores are under way to blocks that have exited");
        for (char* stack : stacks) munmap(stack, kStackBytes);
        if (tsan) __tsan_ignore_thread_end();
        acquire(&end);
    }

    // Of the fiber that runs: a function of it runs here, and then the fiber goes on, unless it is to wait.
    template <class Function>
    void enter(Function&& function) {
        request = [](void* f) { (*static_cast<std::remove_reference_t<Function>*>(f))(); };
        argument = &function;
        leave();
    }

    void pause() {
        enter([this] {
            if (chance() >= switches) return;
            running->waits = true;
            running->block.ready.push_back(running);
        });
    }

    void wait(Queue& queue) {
        running->waits = true;
        queue.push_back(running);
    }

    void wake(Queue& queue) {
        for (Fiber* fiber : queue) fiber->block.ready.push_back(fiber);
        queue.clear();
    }

    // Where ``local``, in the running fiber's block, lies in another one.
    char* locate(const void* local, int rank) {
        Cluster& cluster = running->block.cluster;
        for (const auto& [line, memory] : running->block.variables) {
            if (!memory.holds(local)) continue;
            if (rank >= grid.size) fail("there is no block %d in the cluster", rank);
            for (const int waiting : cluster.to_start) {
                if (waiting == rank) fail("a store to block %d, which has not started", rank);
            }
            if (!cluster.blocks[rank]) fail("a store to block %d, which has exited", rank);
            return cluster.blocks[rank]->variable(line, memory.bytes) + (static_cast<const char*>(local) - memory.data);
        }
        fail("an address outside of the block's memory");
    }

    char* token() { return &tokens.emplace_back(); }

    void advance(Transactions& t) {
        if (t.pending || t.bytes) return;
        t.pending = t.arrivals;
        const auto& done = t.tokens[t.phase++ % 2];
        for (Fiber* fiber : t.waiting) fiber->tokens = done;
        t.tokens[t.phase % 2].clear();
        wake(t.waiting);
    }

    Fiber* running = nullptr;
    std::vector<Store> stores;
    std::map<const uint32_t*, Queue> counting;  // who waits for a number in global memory

private:
    const Grid grid;
    void (*const kernel)(const void*);
    const void* const closure;
    std::mt19937_64 random;
    double starts, deliveries, switches;  // chances at each step, while anything else can run
    std::vector<int> to_launch;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<char*> stacks;  // free ones
    std::deque<char> tokens;
    ucontext_t context;
    void (*request)(void*);
    void *argument, *tsan = nullptr, *fake_stack;
    const void* own_stack;  // of the caller, and its size
    size_t own_stack_bytes;
    char end;

    bool worst() const { return grid.seed == 0; }
    double chance() { return std::uniform_real_distribution<>()(random); }
    size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); }

    template <class T>
    T take(std::vector<T>& list) {
        std::swap(list[below(list.size())], list.back());
        T taken = std::move(list.back());
        list.pop_back();
        return taken;
    }

    template <class T>
    void shuffle(std::vector<T>& list) {
        for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[below(i)]);
    }

    void launch() {
        const int size = grid.size;
        auto cluster = std::make_unique<Cluster>(Cluster{to_launch.back(), {size * grid.threads}, {}});
        to_launch.pop_back();
        cluster->blocks.resize(size);
        for (int i = 0; i < size; ++i) cluster->to_start.push_back(i);
        if (!worst()) shuffle(cluster->to_start);
        clusters.push_back(std::move(cluster));
    }

    std::vector<Cluster*> starting() const {
        std::vector<Cluster*> found;
        for (const auto& cluster : clusters) {
            if (!cluster->to_start.empty()) found.push_back(cluster.get());
        }
        return found;
    }
    bool can_start() const { return !starting().empty(); }

    void start() {
        auto waiting = starting();
        Cluster& cluster = *take(waiting);
        const int rank = cluster.to_start.back();
        cluster.to_start.pop_back();
        auto block = std::make_shared<Block>(Block{cluster, rank, grid.threads, worst() ? rank : chance()});
        block->variable(kDynamic, grid.shared);
        for (int i = 0; i < grid.threads; ++i) {
            const Thread thread = {i, grid.threads, rank, grid.size, cluster.index % grid.clusters * grid.size + rank,
                                   grid.clusters * grid.size, cluster.index / grid.clusters, grid.parts};
            block->ready.push_back(new Fiber{thread, *block, new_stack()});
            prepare(*block->ready.back());
        }
        cluster.blocks[rank] = std::move(block);
    }

    void prepare(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.context, &Scheduler::begin, 0);
        if (tsan) fiber.tsan = __tsan_create_fiber(0);
    }

    char* new_stack() {
        if (!stacks.empty()) return take(stacks);
        void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory");
        return static_cast<char*>(memory);
    }

    // The block of the highest priority that has a thread to run: the others starve. Now and then one's changes.
    Block* highest() {
        Block* found = nullptr;
        for (const auto& cluster : clusters) {
            for (const auto& block : cluster->blocks) {
                if (!block || block->ready.empty()) continue;
                if (chance() < switches) block->priority = chance();
                if (!found || block->priority > found->priority) found = block.get();
            }
        }
        return found;
    }

    void resume(Fiber& fiber) {
        running = &fiber;
        self = &fiber.thread;
        fiber.waits = false;
        while (!fiber.waits) {
            if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
            if (tsan) __tsan_switch_to_fiber(fiber.tsan, kNoOrder);
            swapcontext(&context, &fiber.context);
            if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
            if (fiber.ended) {
                finish(fiber);
                break;
            }
            request(argument);
        }
        running = nullptr;
        self = nullptr;
    }

    void leave() {
        Fiber& fiber = *running;
        void* fake = nullptr;
        if (__sanitizer_start_switch_fiber)
            __sanitizer_start_switch_fiber(fiber.ended ? nullptr : &fake, own_stack, own_stack_bytes);
        if (tsan) __tsan_switch_to_fiber(tsan, kNoOrder);
        swapcontext(&fiber.context, &context);
        if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
    }

    static void begin();

    void finish(Fiber& fiber) {
        Block& block = fiber.block;
        Cluster& cluster = block.cluster;
        if (!fiber.copies.empty()) fail("a thread leaves while copies of its are under way");
        if (fiber.arrived >= 0) fail("a thread leaves between the two halves of the cluster's barrier");
        if (tsan) __tsan_destroy_fiber(fiber.tsan);
        if (tsan) {  // which would take another thread's use of the same stack for a race
            munmap(fiber.stack, kStackBytes);
        } else {
            stacks.push_back(fiber.stack);
        }
        delete &fiber;
        ++cluster.left;
        if (--block.alive) return;
        cluster.blocks[block.rank].reset();
        if (cluster.left < grid.size * grid.threads) return;
        for (auto& one : clusters) {
            if (one.get() != &cluster) continue;
            std::swap(one, clusters.back());
            return clusters.pop_back();
        }
    }

    void deliver(const Store& store) {
        const auto block = store.block.lock();
        if (!block) fail("a store reaches a block that has exited");
        Transactions& t = block->transactions(store.barrier);
        for (int i = 0; 4 * i < store.bytes; ++i) reinterpret_cast<uint32_t*>(store.to)[i] = store.words[i];
        t.bytes -= store.bytes;
        t.tokens[t.phase % 2].push_back(store.token);
        advance(t);
    }

    [[noreturn]] void nothing_can_run() {
        for (const auto& cluster : clusters) {
            size_t at_cluster = cluster->all.waiting.size(), at_block = 0, at_warp = 0, at_barrier = 0;
            for (const auto& block : cluster->blocks) {
                if (!block) continue;
                at_block += block->all.waiting.size();
                for (const auto& [at, transactions] : block->barriers) at_barrier += transactions.waiting.size();
                for (const Warp& warp : block->warps) at_warp += warp.all.waiting.size() + warp.shuffle.waiting.size();
            }
            std::fprintf(stderr,
                         "simt: in cluster %d %zu threads wait at its barrier, %zu at a block's, %zu at a warp's, "
                         "%zu for transactions; %d have left\n",
                         cluster->index, at_cluster, at_block, at_warp, at_barrier, cluster->left);
        }
        fail("nothing can run");
    }
};

Scheduler* scheduler;

void Scheduler::begin() {
    Scheduler& s = *scheduler;
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &s.own_stack, &s.own_stack_bytes);
    s.kernel(s.closure);
    release(&s.end);
    s.running->ended = true;
    s.leave();
}

void segmentation_fault(int, siginfo_t* info, void*) { fail("an access outside of all memory, at %p", info->si_addr); }

}  // namespace

}  // namespace fastkd::simt
