/* Attention inside each text of a packed row, on CPU, without gradient: no padding, no mask, one call for all texts.
 *
 * The queries of a text stand side by side in the lanes of vectors, so that the softmax over keys needs no sum across a
 * vector, and keys and values are read where they lie, a number at a time for all lanes. Scores never leave the cache.
 * Products and sums are float32, whatever the inputs. Threads are those of the OpenMP runtime that torch already runs
 * (its GOMP_parallel is handed in), as a second runtime would bring threads of its own. Called without the GIL.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ROWS 12 /* vectors of sums kept in registers: enough to hide the latency of multiply-add */
#define MAX_D 256

typedef struct {
    const char *data;
    Py_ssize_t head, token; /* strides in elements; dimensions are contiguous */
} Side;

typedef struct {
    Side q, k, v; /* [heads or kv_heads, tokens, d] */
    char *out;    /* [tokens, heads, d] */
    const int64_t *lengths;
    Py_ssize_t texts, heads, kv_heads, d;
    float scale;
    int causal, bf16, failed;
    Py_ssize_t window; /* a token sees those less than this away; 0: all */
    Py_ssize_t scratch; /* floats a thread needs */
    Py_ssize_t *starts;
    Py_ssize_t next; /* piece of work that the next free thread takes */
} Job;

typedef struct { /* of one key/value head */
    Py_ssize_t start, length;
    const float *keys, *values; /* [length, d] */
    Py_ssize_t key_stride, value_stride;
    float *scratch;
} Text;

static inline __attribute__((always_inline)) void load(const Side *side, Py_ssize_t head, Py_ssize_t token, Py_ssize_t d,
                                                       int bf16, float *out) {
    const Py_ssize_t at = head * side->head + token * side->token;
    if (!bf16) {
        memcpy(out, (const float *)side->data + at, (size_t)d * sizeof(float));
        return;
    }
    const uint16_t *in = (const uint16_t *)side->data + at;
    for (Py_ssize_t i = 0; i < d; i++) {
        const uint32_t bits = (uint32_t)in[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

static inline __attribute__((always_inline)) void store(const Job *job, Py_ssize_t token, Py_ssize_t head,
                                                        const float *row) {
    const Py_ssize_t at = (token * job->heads + head) * job->d;
    if (!job->bf16) {
        float *out = (float *)job->out + at;
        for (Py_ssize_t i = 0; i < job->d; i++) out[i] = row[i];
        return;
    }
    uint16_t *out = (uint16_t *)job->out + at;
    for (Py_ssize_t i = 0; i < job->d; i++) {
        const float value = row[i];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        /* To nearest, ties to even; NaN, whose fraction could round away, stays NaN. */
        out[i] = value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}

#if defined(__x86_64__)
#define LANES 16
#define TARGET __attribute__((target("avx512f")))
#define NAME(x) x##_16
#include "_attention_kernel.h"
#undef LANES
#undef TARGET
#undef NAME
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) x##_8
#include "_attention_kernel.h"
#undef LANES
#undef TARGET
#undef NAME
#endif
#define LANES 4
#define TARGET
#define NAME(x) x##_4
#include "_attention_kernel.h"

static int width = 4; /* lanes of the widest vectors in use */

static int choose(int lanes) {
    width = 4;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) width = 8;
    if (lanes >= 16 && width == 8 && __builtin_cpu_supports("avx512f")) width = 16;
#endif
    return width;
}

/* All queries of one head; the last ones in vectors that are no wider than they need. */
static void attend(const Job *job, const Text *text, Py_ssize_t head) {
    for (Py_ssize_t first = 0, step; first < text->length; first += step) {
        const Py_ssize_t rest = text->length - first;
#if defined(__x86_64__)
        if (width == 16 && rest > 8) {
            attend_16(job, text, head, first, step = rest < 16 ? rest : 16);
            continue;
        }
        if (width >= 8 && rest > 4) {
            attend_8(job, text, head, first, step = rest < 8 ? rest : 8);
            continue;
        }
#endif
        attend_4(job, text, head, first, step = rest < 4 ? rest : 4);
    }
}

/* Where a text's keys or values can be read as float32; bfloat16 ones are written out first. */
static const float *as_floats(const Job *job, const Side *side, Py_ssize_t head, const Text *text, float *room,
                              Py_ssize_t *stride) {
    if (!job->bf16) {
        *stride = side->token;
        return (const float *)side->data + head * side->head + text->start * side->token;
    }
    for (Py_ssize_t token = 0; token < text->length; token++)
        load(side, head, text->start + token, job->d, 1, room + token * job->d);
    *stride = job->d;
    return room;
}

static void work(void *data) {
    Job *job = data;
    const Py_ssize_t pieces = job->texts * job->kv_heads;
    float *scratch = malloc((size_t)job->scratch * sizeof(float));
    if (scratch == NULL) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        const Py_ssize_t piece = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (piece >= pieces) break;
        const Py_ssize_t number = piece / job->kv_heads, head = piece % job->kv_heads, shared = job->heads / job->kv_heads;
        Text text = {.start = job->starts[number], .length = (Py_ssize_t)job->lengths[number]};
        float *values = scratch + (job->bf16 ? text.length * job->d : 0);
        text.keys = as_floats(job, &job->k, head, &text, scratch, &text.key_stride);
        text.values = as_floats(job, &job->v, head, &text, values, &text.value_stride);
        text.scratch = values + (job->bf16 ? text.length * job->d : 0);
        for (Py_ssize_t query = head * shared; query < (head + 1) * shared; query++) attend(job, &text, query);
    }
    free(scratch);
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static int prepare(Job *job, Py_ssize_t tokens) {
    Py_ssize_t total = 0, longest = 0;
    for (Py_ssize_t text = 0; text < job->texts; text++) {
        const Py_ssize_t length = (Py_ssize_t)job->lengths[text];
        if (length < 1 || length > tokens - total) {
            PyErr_SetString(PyExc_ValueError, "lengths must be positive and add up to the tokens");
            return 0;
        }
        job->starts[text] = total;
        total += length;
        if (length > longest) longest = length;
    }
    if (total != tokens) {
        PyErr_SetString(PyExc_ValueError, "lengths must be positive and add up to the tokens");
        return 0;
    }
    job->scratch = 16 * (2 * job->d + longest) + (job->bf16 ? 2 * longest * job->d : 0);
    return 1;
}

static PyObject *attention(PyObject *self, PyObject *args) {
    (void)self;
    Job job = {0};
    unsigned long long out, q, k, v, parallel;
    Py_buffer lengths;
    Py_ssize_t tokens;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "K(Knn)(Knn)(Knn)y*nnnnfppKI|n", &out, &q, &job.q.head, &job.q.token, &k, &job.k.head,
                          &job.k.token, &v, &job.v.head, &job.v.token, &lengths, &tokens, &job.heads, &job.kv_heads,
                          &job.d, &job.scale, &job.causal, &job.bf16, &parallel, &threads, &job.window))
        return NULL;
    if (job.window < 0) {
        PyBuffer_Release(&lengths);
        PyErr_SetString(PyExc_ValueError, "a window must not be negative");
        return NULL;
    }
    job.out = (char *)(uintptr_t)out;
    job.q.data = (const char *)(uintptr_t)q;
    job.k.data = (const char *)(uintptr_t)k;
    job.v.data = (const char *)(uintptr_t)v;
    job.lengths = lengths.buf;
    job.texts = lengths.len / (Py_ssize_t)sizeof(int64_t);
    job.starts = malloc((size_t)(job.texts + 1) * sizeof(Py_ssize_t));
    int fine = 0;
    if (job.starts == NULL)
        PyErr_NoMemory();
    else if (lengths.itemsize != sizeof(int64_t))
        PyErr_SetString(PyExc_ValueError, "lengths must be int64");
    else if (job.d < 16 || job.d > MAX_D || job.d % 16 || job.kv_heads < 1 || job.heads % job.kv_heads)
        PyErr_SetString(PyExc_ValueError, "d must be a multiple of 16 up to 256, heads a multiple of kv_heads");
    else
        fine = prepare(&job, tokens);
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        if (parallel && threads > 1)
            ((Parallel)(uintptr_t)parallel)(work, &job, threads, 0);
        else
            work(&job);
        Py_END_ALLOW_THREADS
        if (job.failed) fine = 0, PyErr_NoMemory();
    }
    free(job.starts);
    PyBuffer_Release(&lengths);
    if (!fine) return NULL;
    Py_RETURN_NONE;
}

static PyObject *lanes(PyObject *self, PyObject *args) {
    (void)self;
    int wanted;
    if (!PyArg_ParseTuple(args, "i", &wanted)) return NULL;
    return PyLong_FromLong(choose(wanted));
}

static PyMethodDef methods[] = {
    {"attention", attention, METH_VARARGS, "Fill out from (address, head stride, token stride) of q, k and v."},
    {"lanes", lanes, METH_VARARGS, "Use vectors of at most so many floats; how many it will be on this CPU."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_attention", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__attention(void) {
    choose(16);
    return PyModule_Create(&module);
}
