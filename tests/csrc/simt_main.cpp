// A few small calls of every kernel, each in as many orders as the argument says, for the sanitizers and for planted
// faults. Prints a digest of what came out, and fails where the order changes it or a gap between rows was written.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simt_library.cpp"

namespace {

constexpr int kRows = 5, kColumns = 203, kStride = 210;  // every other row starts off a 16-byte boundary; gaps
constexpr float kGap = 12345.0f;

using Floats = std::vector<float>;

Matrix matrix(Floats& data) { return {reinterpret_cast<char*>(data.data()), 0, kStride, DType::kFloat32}; }

struct Case {
    const char* name;
    bool resident;
    int cluster;
};

struct Outputs {
    Floats rows = Floats(kRows * kStride, kGap), numbers = Floats(kRows * (kNumStats + 2), 0.0f);

    const char* fault() const {
        for (size_t i = 0; i < rows.size(); ++i) {
            if (i % kStride < kColumns ? !(abs(rows[i]) < 1000.0f) : rows[i] != kGap)
                return i % kStride < kColumns ? "not finite" : "a gap between rows was written";
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
        run(out, Order{one.cluster, 32, seed % 2 ? kRows : 2, one.resident, static_cast<uint64_t>(seed)});
        fault = out.fault();
        if (seed && out.digest() != digest) fault = "the order matters";
        digest = out.digest();
    }
    std::printf("%s, %s, clusters of %d: ", one.name, one.resident ? "resident" : "streaming", one.cluster);
    fault ? std::printf("%s\n", fault) : std::printf("%08x\n", digest);
    return !fault;
}

}  // namespace

int main(int, char** arguments) {
    const int orders = std::atoi(arguments[1]);
    Floats z(kRows * kStride, kNaN), u = z;
    for (int i = 0; i < kRows * kStride; ++i) {
        if (i % kStride >= kColumns) continue;
        z[i] = static_cast<float>(i * 37 % 101) / 10.0f;
        u[i] = i / kStride == 1 ? z[i] + static_cast<float>(i * 53 % 97) * 1e-5f : static_cast<float>(i * 53 % 97) / 10.0f;
    }
    Floats shifted(1);  // off a boundary by another amount
    shifted.insert(shifted.end(), u.begin(), u.end());
    const std::vector<int64_t> labels = {3, 200, 0, 100, 57};
    const Floats scale = {0.5f, 1.0f, 0.0f, 0.25f, 1.0f};  // the third does not count
    KDRowsParams p;
    p.labels = labels.data(), p.hard_scale = scale.data(), p.soft_scale = scale.data();
    p.rows = p.inner_rows = kRows, p.n = kColumns - 2, p.columns = kColumns, p.temperature = 2.0f;
    p.c_t = p.c_s = 0.5f;
    LogSoftmaxParams l;
    l.x = matrix(z), l.rows = l.inner_rows = kRows, l.columns = kColumns, l.temperature = 2.0f;
    bool ok = true;
    for (const bool resident : {true, false}) {
        for (const int cluster : {1, 2, 4}) {
            if (!resident && cluster > 1) continue;  // which streams with no clusters
            const auto run = [&](Outputs& out, const Order& order) {
                p.dz = matrix(out.rows);
                p.hard = out.numbers.data(), p.soft = p.hard + kRows, p.stats = p.soft + kRows;
                simt_kd_rows(&p, &order);
            };
            p.z = matrix(z), p.u = matrix(u), p.w = 0.0f;
            ok &= check({"forward KL", resident, cluster}, orders, run);
            ok &= check({"in place", resident, cluster}, orders, [&](Outputs& out, const Order& order) {
                for (int i = 0; i < kRows * kStride; ++i) out.rows[i] = i % kStride < kColumns ? z[i] : kGap;
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
                Floats unused(kRows * kStride);
                l.dy = Matrix{}, l.out = matrix(unused), l.lse = out.numbers.data();
                simt_log_softmax(&l, &order);
                l.dy = matrix(u), l.out = matrix(out.rows);
                simt_log_softmax(&l, &order);
            });
        }
    }
    ok &= check({"scale", false, 1}, orders, [&](Outputs& out, const Order& order) {
        for (int i = 0; i < kRows * kStride; ++i) out.rows[i] = i % kStride < kColumns ? z[i] : kGap;
        ScaleParams s;
        s.x = matrix(out.rows), s.rows = s.inner_rows = kRows, s.columns = kColumns;
        simt_scale(&s, &scale[0], &order);
    });
    return ok ? 0 : 1;
}
