// Rows over PyTorch's threads, or over a pool of our own where it has none to lend.
//
// After an operator PyTorch's threads spin for some milliseconds, awaiting the next one: threads of others get half of
// their cores at most, and those of another OpenMP library would spin too. So ours is the one that the process has.
#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace fastkd {
namespace {

// Waking a thread costs about 10 µs: some 64 KB of logits on one core.
constexpr int64_t kBytesPerThread = 128 * 1024;
// Rows are handed out in runs of about this size: so large that two threads rarely meet in a large page of fresh
// memory, which each would then clear; and at least so many a thread that none waits long for the last.
constexpr int64_t kBytesPerRun = 4 << 20;
constexpr int64_t kRunsPerThread = 16;

float* scratch_of(int64_t floats) {
    thread_local std::unique_ptr<float[]> kept;
    thread_local int64_t size = 0;
    if (size < floats) {
        kept.reset();
        size = 0;
        kept.reset(new float[floats + 16]);
        size = floats;
    }
    // Aligned to a cache line, which halves the cost of wide stores.
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(kept.get()) + 63) & ~uintptr_t{63});
}

struct Job {
    int64_t rows, run, scratch_floats;
    const void* context;
    void (*row)(const void*, int64_t, float*);
    std::atomic<int64_t> next{0};

    // Of a thread that may have no memory: the others then take its rows.
    void help() {
        try {
            work();
        } catch (const std::bad_alloc&) {
        }
    }

    // Throws std::bad_alloc before it takes a row. A thread for which none is left takes no memory either.
    void work() {
        if (next.load(std::memory_order_relaxed) >= rows) return;
        float* scratch = scratch_of(scratch_floats);
        for (int64_t first; (first = next.fetch_add(run, std::memory_order_relaxed)) < rows;)
            for (int64_t i = first; i < rows && i < first + run; ++i) row(context, i, scratch);
    }
};

// What GCC compiles "#pragma omp parallel" to; LLVM's library has it too. Null in a child forked since this was loaded,
// whose threads are gone though the library does not know.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
const pid_t loaded_by = getpid();

Parallel parallel() {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == loaded_by ? found : nullptr;
}

class Pool {
   public:
    std::mutex in_use;  // held by the call that has the threads

    void run(Job& job, int helpers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this, started_).detach();
            } catch (const std::system_error&) {  // no more threads to be had: fewer do it
                helpers = started_;
            }
            job_ = &job;
            helpers_ = busy_ = helpers;
            ++calls_;
        }
        wake_.notify_all();
        job.work();  // throws nothing: the scratch is there
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

   private:
    void serve(int index) {
        std::unique_lock<std::mutex> lock(mutex_);
        // A thread that starts late belongs to the call that started it, of which it has seen nothing yet.
        for (uint64_t seen = calls_ - (index < helpers_ && busy_ > 0);;) {
            wake_.wait(lock, [&] { return calls_ != seen; });
            seen = calls_;
            if (index >= helpers_) continue;
            Job& job = *job_;
            lock.unlock();
            job.help();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int started_ = 0, helpers_ = 0, busy_ = 0;
    uint64_t calls_ = 0;
};

// Never destroyed, since its threads wait in it until the process ends. A forked child has none of them: it gets a new
// pool, and leaves the old one, whose mutexes may be locked for ever, alone.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        current = new Pool;
        owner = getpid();
    }
    return *current;
}

}  // namespace

void parallel_rows(int64_t rows, int64_t row_bytes, int threads, int64_t scratch_floats, const void* context,
                   void (*row)(const void*, int64_t, float*)) {
    const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t wanted = at_most(at_most(threads, rows), rows * row_bytes / kBytesPerThread);
    const int64_t run = at_most(kBytesPerRun / (row_bytes + 1), rows / (kRunsPerThread * (wanted + 1))) + 1;
    Job job{rows, run, scratch_floats, context, row};
    scratch_of(scratch_floats);  // what it throws, it throws before other threads know of the job
    if (wanted > 1) {
        // All of them, as PyTorch has it: GNU's library ends those that a call leaves out.
        if (const Parallel run_all = parallel())
            return run_all([](void* of) { static_cast<Job*>(of)->help(); }, &job, static_cast<unsigned>(threads), 0);
        Pool& shared = pool();
        std::unique_lock<std::mutex> lock(shared.in_use, std::try_to_lock);
        if (lock.owns_lock()) return shared.run(job, static_cast<int>(wanted) - 1);
    }
    job.work();
}

}  // namespace fastkd
