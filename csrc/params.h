// What a call works on: raw pointers, sizes, strides, numbers. No layer above is visible here, PyTorch least of all.
#pragma once

#include "numeric.h"

namespace fastkd {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

FASTKD_HD constexpr int64_t size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// [B, S, columns], last stride 1; strides in elements.
struct Matrix {
    char* data = nullptr;
    int64_t outer = 0, inner = 0;
    DType dtype = DType::kFloat32;

    // The start of row b·S + s, in 64 bits: N·V is beyond 2³¹ in ordinary use.
    FASTKD_HD char* row(int64_t row, int64_t inner_rows) const {
        return data + (row / inner_rows * outer + row % inner_rows * inner) * size_of(dtype);
    }
};

// The label of a row that counts, where its column is in another slice of the vocabulary; as in fastkd/_request.py.
constexpr int64_t kElsewhere = INT64_MIN;

struct KDRowsParams {
    Matrix z;                           // [B, S, columns] student logits
    Matrix u;                           // [B, S, >= n] teacher logits; no data: no soft term
    Matrix dz;                          // [B, S, columns] gradient, of any dtype; no data: losses alone; may be z
    const int64_t* labels = nullptr;    // [N]; null: no hard term
    const float* hard_scale = nullptr;  // [N]
    const float* soft_scale = nullptr;  // [N]
    const float* z_scale = nullptr;     // [N]; null: no z-loss
    float* hard = nullptr;              // [N]
    float* soft = nullptr;              // [N]
    float* stats = nullptr;             // [N, 8], see Stats
    int64_t rows = 0, inner_rows = 0;   // N = B·S, S
    int64_t n = 0, columns = 0;         // tokens, and columns of z and dz: those past n get gradient 0
    float temperature = 1.0f, c_t = 1.0f, c_s = 0.0f, w = 0.0f, smoothing = 0.0f;
    int formula = 0;
    bool from_stats = false;            // the gradient alone, from stats

    // The dtype of z, u and dz, or float32, which holds them all, if they differ.
    DType common_dtype() const {
        const auto differs = [&](const Matrix& matrix) { return matrix.data && matrix.dtype != z.dtype; };
        return differs(u) || differs(dz) ? DType::kFloat32 : z.dtype;
    }
};

// Of these columns of a row, given its normalisers by stats: Σ term and Σ g in the far form, and in the near one, which
// repeats the far one where that tells that the row is far. Of a two-sided divergence the third is Σ p_t − p_s, and the
// last Σ g on the other side.
struct SliceParams : KDRowsParams {
    float* sums = nullptr;  // [N, 4]
};

// Of a row of which a teacher lists K columns: what there is to know of the others, which is `soft`; or their gradient.
struct RestParams : KDRowsParams {
    const int32_t* listed = nullptr;      // [N, k] columns, distinct in a row; −1 for none
    int64_t k = 0;
    const float* outcome_grad = nullptr;  // [N, k + 1], the last of the others
    // Or all at once: the row operation on the k + 1 outcomes between the two, of which the numbers above are.
    const float* outcomes = nullptr;       // [N, k + 1] the teacher's log-probabilities; null: not all at once
    const float* outcome_scale = nullptr;  // [N] the soft scale of these
    int64_t count = 0;                     // of outcomes: k + 1, or k without the others
};

// Columns of the statistics, as in fastkd/_request.py: the peaks of z and u; log Σ exp of z − peak and (z − peak)/T;
// that of (u − peak)/T less the latter; G; 1 − p_y; the form of g. Those of an absent term are 0.
enum Stats : int {
    kPeakStudent, kPeakTeacher, kLogHard, kLogStudent, kLogRatio, kGradSum, kLabelRest, kGradForm, kNumStats
};

struct LogSoftmaxParams {
    Matrix x;                          // [B, S, columns] logits
    Matrix out;                        // [B, S, columns] log-probabilities, or the logits' gradient
    Matrix dy;                         // [B, S, columns] gradient of the log-probabilities; no data: forward
    float* lse = nullptr;              // [N, 2] written forward, read backward: peak, log Σ exp((x − peak)/T)
    int64_t rows = 0, inner_rows = 0;  // N = B·S, S
    int64_t columns = 0;
    float temperature = 1.0f;
};

struct ScaleParams {
    Matrix x;                          // [B, S, columns], scaled in place
    int64_t rows = 0, inner_rows = 0;  // N = B·S, S
    int64_t columns = 0;
    float scalar = 1.0f;
};

// As in fastkd/_request.py.
enum class HiddenKind : int { kMSE = 0, kCosine = 1 };

struct HiddenParams {
    Matrix s, t;                       // [B, S, columns] hidden states of student and teacher
    Matrix ds;                         // [B, S, columns] gradient; no data: losses alone
    const float* scale = nullptr;      // [N]
    float* loss = nullptr;             // [N]
    int64_t rows = 0, inner_rows = 0;  // N = B·S, S
    int64_t columns = 0;
    HiddenKind kind = HiddenKind::kMSE;
};

}  // namespace fastkd
