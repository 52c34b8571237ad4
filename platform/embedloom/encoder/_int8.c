/* Linear layers in 8 bits on CPUs with AVX-512 VNNI: y = x W^T + b with a scale for each row of x and each output.
 *
 * m rows, k inputs (a multiple of 16), n outputs (a multiple of 16). Weights are stored 64 outputs by 64 outputs: for every
 * four inputs the 64 x 4 signed bytes that four VNNI instructions read. Rows become unsigned bytes (code + 128), as the
 * instruction multiplies unsigned by signed; 128 times the sum of an output's codes is taken off again. Sums are exact.
 * What follows a product in a transformer (bias, GELU, the residual) is done while the sums are in registers. Threads are
 * those of the OpenMP runtime that torch already runs (its GOMP_parallel is handed in). Called without the GIL.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_KERNEL 1
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE TARGET static inline __attribute__((always_inline))
#else
#define HAVE_KERNEL 0
#endif

#define OUTPUTS 64 /* of a block: four registers of sums */
#define ROWS 6     /* at a time: 24 registers of sums, 4 of weights, of the 32 there are */

typedef struct {
    Py_ssize_t m, k, n;
    const float *x;        /* [m, k] */
    const int8_t *weights; /* [ceil(n / 64), k / 4, 64, 4] */
    const float *scales;   /* [n] */
    const int32_t *offsets; /* [n] 128 x sum of an output's codes */
    const float *bias;     /* [n] or NULL */
    const float *residual; /* [m, n] or NULL */
    float *y;              /* [m, n] */
    int gelu;
    uint8_t *codes;        /* [m, k] */
    float *row_scales;     /* [m] */
    Py_ssize_t next;       /* piece of work that the next free thread takes */
} Job;

#if HAVE_KERNEL

/* One row: its largest component becomes 127. NaN and infinity make the whole row NaN, as they would a product's. */
TARGET static void quantize(const Job *job, Py_ssize_t row) {
    const float *x = job->x + row * job->k;
    uint8_t *codes = job->codes + row * job->k;
    __m512 most = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (Py_ssize_t i = 0; i < job->k; i += 16) {
        const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(x + i));
        most = _mm512_max_ps(most, size);
        odd |= (__mmask16)~_mm512_cmp_ps_mask(size, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    }
    const float largest = _mm512_reduce_max_ps(most);
    job->row_scales[row] = odd ? __builtin_nanf("") : largest / 127.0f;
    const __m512 factor = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    const __m512i middle = _mm512_set1_epi32(128);
    for (Py_ssize_t i = 0; i < job->k; i += 16) {
        const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_add_epi32(code, middle), _mm512_setzero_si512())));
    }
}

/* e^x for x <= 0, to 2 units in the last place. */
INLINE __m512 exp_negative(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 e = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3888889e-3f), _mm512_set1_ps(8.3333333e-3f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(4.1666667e-2f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.6666667e-1f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.5f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(e, n);
}

/* x Phi(x), with the error function to 1.5e-7 (Abramowitz and Stegun 7.1.26). */
INLINE __m512 gelu(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
    __m512 p = _mm512_fmadd_ps(t, _mm512_set1_ps(1.061405429f), _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    /* 1 - erf(z), halved: the weight of the far side. */
    const __m512 far = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(p, t), exp_negative(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), z))), _mm512_set1_ps(0.5f));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_blend_ps(negative, _mm512_sub_ps(_mm512_set1_ps(1.0f), far), far));
}

INLINE void block(const Job *job, Py_ssize_t number, Py_ssize_t first, const int rows) {
    const int8_t *weights = job->weights + number * job->k * OUTPUTS;
    const uint8_t *codes = job->codes + first * job->k;
    /* Not what is indexed by a variable below: that does not stay in registers. */
    __m512i acc[ROWS][4], sums[ROWS][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) acc[row][part] = _mm512_setzero_si512();
    for (Py_ssize_t quad = 0; quad < job->k / 4; quad++) {
        const int8_t *at = weights + quad * 4 * OUTPUTS;
        const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
        const __m512i w2 = _mm512_loadu_si512(at + 128), w3 = _mm512_loadu_si512(at + 192);
        for (int row = 0; row < rows; row++) {
            int32_t four;
            __builtin_memcpy(&four, codes + row * job->k + quad * 4, 4);
            const __m512i x = _mm512_set1_epi32(four);
            acc[row][0] = _mm512_dpbusd_epi32(acc[row][0], x, w0);
            acc[row][1] = _mm512_dpbusd_epi32(acc[row][1], x, w1);
            acc[row][2] = _mm512_dpbusd_epi32(acc[row][2], x, w2);
            acc[row][3] = _mm512_dpbusd_epi32(acc[row][3], x, w3);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) sums[row][part] = acc[row][part];
    for (int part = 0; part < 4; part++) {
        const Py_ssize_t output = number * OUTPUTS + part * 16;
        if (output >= job->n) break;
        const __m512 scale = _mm512_loadu_ps(job->scales + output);
        const __m512i offset = _mm512_loadu_si512(job->offsets + output);
        const __m512 bias = job->bias ? _mm512_loadu_ps(job->bias + output) : _mm512_setzero_ps();
        for (int row = 0; row < rows; row++) {
            const Py_ssize_t place = (first + row) * job->n + output;
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[row][part], offset));
            __m512 y = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(job->row_scales[first + row])), bias);
            if (job->gelu) y = gelu(y);
            if (job->residual) y = _mm512_add_ps(y, _mm512_loadu_ps(job->residual + place));
            _mm512_storeu_ps(job->y + place, y);
        }
    }
}

TARGET static void columns(const Job *job, Py_ssize_t number) {
    Py_ssize_t row = 0;
    for (; row + ROWS <= job->m; row += ROWS) block(job, number, row, ROWS);
    switch (job->m - row) {
    case 5: block(job, number, row, 5); break;
    case 4: block(job, number, row, 4); break;
    case 3: block(job, number, row, 3); break;
    case 2: block(job, number, row, 2); break;
    case 1: block(job, number, row, 1); break;
    default: break;
    }
}

static int is_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#else

static void quantize(const Job *job, Py_ssize_t row) { (void)job, (void)row; }
static void columns(const Job *job, Py_ssize_t number) { (void)job, (void)number; }
static int is_supported(void) { return 0; }

#endif

static void quantize_all(void *data) {
    Job *job = data;
    for (;;) {
        const Py_ssize_t first = __atomic_fetch_add(&job->next, 32, __ATOMIC_RELAXED);
        if (first >= job->m) break;
        for (Py_ssize_t row = first; row < job->m && row < first + 32; row++) quantize(job, row);
    }
}

static void multiply_all(void *data) {
    Job *job = data;
    for (;;) {
        const Py_ssize_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (number * OUTPUTS >= job->n) break;
        columns(job, number);
    }
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static void run(Job *job, void (*work)(void *), Py_ssize_t pieces, Parallel parallel, unsigned threads) {
    job->next = 0;
    if (parallel && threads > 1 && pieces > 1)
        parallel(work, job, threads, 0);
    else
        work(job);
}

static PyObject *linear(PyObject *self, PyObject *args) {
    (void)self;
    Job job = {0};
    unsigned long long x, weights, scales, offsets, bias, residual, y, parallel;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "nnnKKKKKKKpKI", &job.m, &job.k, &job.n, &x, &weights, &scales, &offsets, &bias, &residual,
                          &y, &job.gelu, &parallel, &threads))
        return NULL;
    if (!is_supported()) {
        PyErr_SetString(PyExc_RuntimeError, "this CPU has no AVX-512 VNNI");
        return NULL;
    }
    if (job.m < 1 || job.k < 16 || job.n < 16 || job.k % 16 || job.n % 16) {
        PyErr_SetString(PyExc_ValueError, "rows must be positive, inputs and outputs multiples of 16");
        return NULL;
    }
    job.x = (const float *)(uintptr_t)x;
    job.weights = (const int8_t *)(uintptr_t)weights;
    job.scales = (const float *)(uintptr_t)scales;
    job.offsets = (const int32_t *)(uintptr_t)offsets;
    job.bias = (const float *)(uintptr_t)bias;
    job.residual = (const float *)(uintptr_t)residual;
    job.y = (float *)(uintptr_t)y;
    job.codes = malloc((size_t)(job.m * job.k) + (size_t)job.m * sizeof(float));
    if (job.codes == NULL) return PyErr_NoMemory();
    /* k is a multiple of 16, so what follows the codes is aligned. */
    job.row_scales = (float *)(void *)(job.codes + job.m * job.k);
    Py_BEGIN_ALLOW_THREADS
    run(&job, quantize_all, job.m / 32, (Parallel)(uintptr_t)parallel, threads);
    run(&job, multiply_all, job.n / OUTPUTS, (Parallel)(uintptr_t)parallel, threads);
    Py_END_ALLOW_THREADS
    free(job.codes);
    Py_RETURN_NONE;
}

static PyObject *supported(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyBool_FromLong(is_supported());
}

static PyMethodDef methods[] = {
    {"linear", linear, METH_VARARGS, "linear(m, k, n, x, weights, scales, offsets, bias, residual, y, gelu, parallel, threads): addresses; 0 for none."},
    {"supported", supported, METH_NOARGS, "Whether this CPU has AVX-512 VNNI."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_int8", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__int8(void) { return PyModule_Create(&module); }
