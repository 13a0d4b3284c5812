// The n best of a row of scores.
#pragma once

namespace hybrimoe {

// Fills order[0..n) with the indices of the n largest scores, best first; ties go to the lower index. Selection by
// insertion: n is small against n_scores, and one pass needs no second array.
inline void top_scores(const float * scores, int n_scores, int n, int * order) {
    int n_kept = 0;
    for (int e = 0; e < n_scores; ++e) {
        const float score = scores[e];
        if (n_kept == n && !(score > scores[order[n - 1]])) {
            continue;
        }
        int at = n_kept < n ? n_kept++ : n - 1;
        while (at > 0 && score > scores[order[at - 1]]) {
            order[at] = order[at - 1];
            --at;
        }
        order[at] = e;
    }
}

} // namespace hybrimoe
