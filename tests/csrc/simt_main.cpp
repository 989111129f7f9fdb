// A few small calls of every kernel, each in as many orders as the argument says, for the sanitizers and for planted
// faults. Prints a digest of what came out, and fails where the order changes it or a gap between rows was written.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simt_library.cpp"

namespace {

// Rows start one or three numbers off a 16-byte boundary, have gaps between them, and fill the shares of two blocks.
constexpr int kRows = 5, kColumns = 253, kStride = 262, kTokens = kColumns - 2;
constexpr float kGap = 12345.0f;

using Floats = std::vector<float>;

// Rows in memory, the first number of which is in none.
Floats make_rows() { return Floats(1 + kRows * kStride, kGap); }
float& at(Floats& rows, int row, int column) { return rows[1 + row * kStride + column]; }
Matrix matrix(Floats& rows) { return {reinterpret_cast<char*>(&rows[1]), 0, kStride, DType::kFloat32}; }

struct Case {
    const char* name;
    bool resident;
    int cluster;
};

struct Outputs {
    Floats rows = make_rows(), numbers = Floats(kRows * (kNumStats + 2), 0.0f);

    const char* fault() {
        for (int i = 0; i < static_cast<int>(rows.size()); ++i) {
            const bool gap = i == 0 || (i - 1) % kStride >= kColumns;
            if (gap && rows[i] != kGap) return "a gap between rows was written";
            if (!gap && !(abs(rows[i]) < 1000.0f)) return "not finite";
        }
        return nullptr;
    }

    uint32_t digest() const {
        uint32_t hash = 2166136261u;
        for (const Floats* floats : {&rows, &numbers}) {
            for (const float x : *floats) hash = (hash ^ bit_cast<uint32_t>(x)) * 16777619u;
        }
        return hash;
    }
};

// Runs the same in each order, on two clusters or as many as rows.
template <class Run>
bool check(const Case& one, int orders, Run&& run) {
    uint32_t digest = 0;
    const char* fault = nullptr;
    for (int seed = 0; seed < orders && !fault; ++seed) {
        Outputs out;
        const int threads = one.cluster == 2 ? 64 : 32, clusters = seed % 2 ? kRows : 2;
        run(out, Order{one.cluster, threads, clusters, one.resident, static_cast<uint64_t>(seed)});
        fault = out.fault();
        if (seed && out.digest() != digest) fault = "the order matters";
        digest = out.digest();
    }
    std::printf("%s, %s by %d: ", one.name, one.resident ? "resident" : "streaming", one.cluster);
    fault ? std::printf("%s\n", fault) : std::printf("%08x\n", digest);
    return !fault;
}

}  // namespace

int main(int, char** arguments) {
    const int orders = std::atoi(arguments[1]);
    std::setvbuf(stdout, nullptr, _IONBF, 0);
    Floats z = make_rows(), u = z;
    for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
            const int i = row * kStride + column;
            at(z, row, column) = static_cast<float>(i * 37 % 101) / 10.0f;
            const float other = static_cast<float>(i * 53 % 97);
            at(u, row, column) = row == 1 ? at(z, row, column) + other * 1e-5f : other / 10.0f;  // near convergence
        }
    }
    Floats shifted(1);  // off a boundary by another amount
    shifted.insert(shifted.end(), u.begin(), u.end());
    const std::vector<int64_t> labels = {3, 250, 0, 100, 57};
    const Floats scale = {0.5f, 1.0f, 0.0f, 0.25f, 1.0f};  // the third does not count
    KDRowsParams p;
    p.labels = labels.data(), p.hard_scale = scale.data(), p.soft_scale = scale.data();
    p.rows = p.inner_rows = kRows, p.n = kTokens, p.columns = kColumns, p.temperature = 2.0f;
    p.c_t = p.c_s = 0.5f;
    LogSoftmaxParams l;
    l.x = matrix(z), l.rows = l.inner_rows = kRows, l.columns = kColumns, l.temperature = 2.0f;
    bool ok = true;
    for (const bool resident : {true, false}) {
        for (const int cluster : {1, 2, 4}) {
            const auto run = [&](Outputs& out, const Order& order) {
                p.dz = matrix(out.rows);
                p.hard = out.numbers.data(), p.soft = p.hard + kRows, p.stats = p.soft + kRows;
                simt_kd_rows(&p, &order);
            };
            p.z = matrix(z), p.u = matrix(u), p.w = 0.0f;
            ok &= check({"forward KL", resident, cluster}, orders, run);
            ok &= check({"in place", resident, cluster}, orders, [&](Outputs& out, const Order& order) {
                out.rows = z;
                p.z = matrix(out.rows);
                run(out, order);
            });
            p.z = matrix(z), p.u = matrix(shifted), p.w = 0.5f;
            p.u.data += sizeof(float);
            ok &= check({"mixture", resident, cluster}, orders, run);
            ok &= check({"log-softmax", resident, cluster}, orders, [&](Outputs& out, const Order& order) {
                l.dy = Matrix{}, l.out = matrix(out.rows), l.lse = out.numbers.data();
                simt_log_softmax(&l, &order);
            });
            ok &= check({"its gradient", resident, cluster}, orders, [&](Outputs& out, const Order& order) {
                Floats unused = make_rows();
                l.dy = Matrix{}, l.out = matrix(unused), l.lse = out.numbers.data();
                simt_log_softmax(&l, &order);
                l.dy = matrix(u), l.out = matrix(out.rows);
                simt_log_softmax(&l, &order);
            });
        }
    }
    for (const int parts : {1, 3}) {
        ok &= check({"the sums of a slice", false, parts}, orders, [&](Outputs& out, const Order& order) {
            SliceParams q;
            static_cast<KDRowsParams&>(q) = p;
            q.dz = matrix(out.rows), q.w = 0.5f;
            q.hard = out.numbers.data(), q.soft = q.hard + kRows, q.stats = q.soft + kRows;
            simt_kd_rows(&q, &order);
            q.dz = Matrix{}, q.from_stats = true;
            q.sums = &at(out.rows, 0, 0);
            simt_slice_sums(&q, &order);
        });
        ok &= check({"the rest, in place", false, parts}, orders, [&](Outputs& out, const Order& order) {
            constexpr int kListed = 40;
            std::vector<int32_t> listed;
            Floats outcome_grad, scratch(kRows * kListed);
            for (int i = 0; i < kRows * kListed; ++i)
                listed.push_back(i % kListed ? i % kListed * 6 + i / kListed : -1);
            for (int i = 0; i < kRows * (kListed + 1); ++i) outcome_grad.push_back(static_cast<float>(i % 13) - 6.0f);
            out.rows = z;
            RestParams q;
            static_cast<KDRowsParams&>(q) = p;
            q.z = matrix(out.rows), q.u = q.dz = Matrix{};
            q.hard = out.numbers.data(), q.soft = q.hard + kRows, q.stats = q.soft + kRows;
            q.listed = listed.data(), q.k = kListed, q.outcome_grad = outcome_grad.data();
            simt_rest(&q, nullptr, &order);
            q.dz = q.z, q.from_stats = true;
            simt_rest(&q, scratch.data(), &order);
        });
    }
    ok &= check({"scale", false, 3}, orders, [&](Outputs& out, const Order& order) {
        out.rows = z;
        ScaleParams s;
        s.x = matrix(out.rows), s.rows = s.inner_rows = kRows, s.columns = kColumns;
        simt_scale(&s, &scale[0], &order);
    });
    return ok ? 0 : 1;
}
