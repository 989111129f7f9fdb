// A few small calls of every kernel, for the thread and address sanitizers: they judge, nothing is compared here.
#include <cstdio>
#include <vector>

#include "simt_library.cpp"

int main() {
    constexpr int64_t kRows = 2, kColumns = 203;  // rows start off 16-byte boundaries
    std::vector<float> z(kRows * kColumns), u(z.size()), dz(z.size()), hard(kRows), soft(kRows), lse(2 * kRows), stats(kRows * kNumStats);
    for (size_t i = 0; i < z.size(); ++i) {
        z[i] = static_cast<float>(i * 37 % 101) / 10.0f;
        u[i] = static_cast<float>(i * 53 % 97) / 10.0f;
    }
    const std::vector<int64_t> labels = {3, 200};
    const std::vector<float> scale = {0.5f, 1.0f};
    const auto matrix = [&](std::vector<float>& data) {
        return Matrix{reinterpret_cast<char*>(data.data()), 0, kColumns, DType::kFloat32};
    };
    KDRowsParams p;
    p.z = matrix(z), p.u = matrix(u), p.dz = matrix(dz);
    p.labels = labels.data(), p.hard_scale = scale.data(), p.soft_scale = scale.data();
    p.hard = hard.data(), p.soft = soft.data(), p.stats = stats.data();
    p.rows = p.inner_rows = kRows, p.n = kColumns - 2, p.columns = kColumns, p.temperature = 2.0f;
    LogSoftmaxParams l;
    l.x = matrix(z), l.out = matrix(dz), l.lse = lse.data(), l.rows = l.inner_rows = kRows, l.columns = kColumns;
    for (const bool resident : {true, false}) {
        for (const int cluster : {1, 2, 4}) {
            for (const float w : {0.0f, 0.5f}) {
                p.w = w;
                simt_kd_rows(&p, cluster, 32, resident, 1);
            }
            l.dy = Matrix{};
            simt_log_softmax(&l, cluster, 32, resident);
            l.dy = matrix(u);
            simt_log_softmax(&l, cluster, 32, resident);
        }
    }
    ScaleParams s;
    s.x = matrix(dz), s.rows = s.inner_rows = kRows, s.columns = kColumns;
    simt_scale(&s, &scale[0], 64);
    std::puts("ran");
}
