/* The loops of _attention.c for LANES queries side by side; included once for each width, with TARGET and NAME set. */

typedef float NAME(vf) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAME(vi) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define VF NAME(vf)
#define VI NAME(vi)
#define INLINE TARGET static inline __attribute__((always_inline))

INLINE VF NAME(larger)(VF a, VF b) {
    const VI first = a > b;
    return (VF)((first & (VI)a) | (~first & (VI)b));
}

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor series. What would be
 * denormal is 1e-38; NaN stays NaN. */
INLINE VF NAME(exp_negative)(VF x) {
    const VF lowest = (VF){0} - 87.0f;
    const VI low = x < lowest;
    x = (VF)((low & (VI)lowest) | (~low & (VI)x));
    const VF shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer, kept in the low bits */
    const VF n = shifted - 12582912.0f;
    VF r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VF e = r * 1.3888889e-3f + 8.3333333e-3f;
    e = e * r + 4.1666667e-2f;
    e = e * r + 1.6666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return (VF)((VI)e + (((VI)shifted - 0x4B400000) << 23));
}

/* c[rows, LANES] = a[rows, inner] b[inner, LANES]; a with any strides. */
INLINE void NAME(rows_product)(const float *a, Py_ssize_t a_row, Py_ssize_t a_inner, const float *b, float *c,
                               const int rows, Py_ssize_t inner) {
    VF sums[MOST_ROWS];
    for (int row = 0; row < rows; row++) sums[row] = (VF){0};
    for (Py_ssize_t k = 0; k < inner; k++) {
        const VF right = *(const VF *)(b + k * LANES);
        for (int row = 0; row < rows; row++) sums[row] += a[row * a_row + k * a_inner] * right;
    }
    for (int row = 0; row < rows; row++) *(VF *)(c + row * LANES) = sums[row];
}

/* The same for any number of rows, in steps whose sums stay in registers. */
INLINE void NAME(product)(const float *a, Py_ssize_t a_row, Py_ssize_t a_inner, const float *b, float *c,
                          Py_ssize_t rows, Py_ssize_t inner) {
#define STEP(count)                                                                                                    \
    for (; rows - done >= count; done += count)                                                                        \
    NAME(rows_product)(a + done * a_row, a_row, a_inner, b, c + done * LANES, count, inner)
    Py_ssize_t done = 0;
    STEP(12);
    STEP(6);
    STEP(4);
    STEP(2);
    STEP(1);
#undef STEP
}

/* Scores [keys, LANES] into weights; gives 1 / their sums. */
INLINE VF NAME(softmax)(float *scores, Py_ssize_t keys) {
    VF most = *(VF *)scores, sums = (VF){0};
    for (Py_ssize_t key = 1; key < keys; key++) most = NAME(larger)(most, *(VF *)(scores + key * LANES));
    for (Py_ssize_t key = 0; key < keys; key++) {
        const VF weights = NAME(exp_negative)(*(VF *)(scores + key * LANES) - most);
        *(VF *)(scores + key * LANES) = weights;
        sums += weights;
    }
    return 1.0f / sums;
}

/* The queries first to first + live (at most LANES) of a text, one head. */
TARGET static void NAME(attend)(const Job *job, const Text *text, Py_ssize_t head, Py_ssize_t first, Py_ssize_t live) {
    const Py_ssize_t d = job->d, window = job->window, length = text->length;
    /* The keys that any of these queries sees: of a window, those less than it away; causal, none that is later. */
    const Py_ssize_t from = window && first >= window ? first - window + 1 : 0;
    const Py_ssize_t ahead = job->causal ? first + live : window ? first + live + window - 1 : length;
    const Py_ssize_t seen = (ahead < length ? ahead : length) - from;
    float *queries = text->scratch, *sums = queries + d * LANES, *scores = sums + d * LANES, row[MAX_D];
    VF scale;
    if (live < LANES) memset(queries, 0, (size_t)(d * LANES) * sizeof(float));
    for (Py_ssize_t lane = 0; lane < live; lane++) {
        load(&job->q, head, text->start + first + lane, d, job->bf16, row);
        for (Py_ssize_t at = 0; at < d; at++) queries[at * LANES + lane] = row[at] * job->scale;
    }
    NAME(product)(text->keys + from * text->key_stride, text->key_stride, 1, queries, scores, seen, d);
    if (job->causal)
        for (Py_ssize_t later = 1; later < live; later++)
            for (Py_ssize_t lane = 0; lane < later; lane++) scores[(first + later - from) * LANES + lane] = -INFINITY;
    if (window)
        for (Py_ssize_t lane = 0; lane < live; lane++) {
            for (Py_ssize_t key = from; key <= first + lane - window; key++) scores[(key - from) * LANES + lane] = -INFINITY;
            for (Py_ssize_t key = first + lane + window; key < from + seen; key++)
                scores[(key - from) * LANES + lane] = -INFINITY;
        }
    scale = NAME(softmax)(scores, seen);
    NAME(product)(text->values + from * text->value_stride, 1, text->value_stride, scores, sums, d, seen);
    for (Py_ssize_t at = 0; at < d; at++) *(VF *)(sums + at * LANES) *= scale;
    for (Py_ssize_t lane = 0; lane < live; lane++) {
        for (Py_ssize_t at = 0; at < d; at++) row[at] = sums[at * LANES + lane];
        store(job, text->start + first + lane, head, row);
    }
}

#undef VF
#undef VI
#undef INLINE
