/* The two inner loops of the 8-bit search (int8.py says what they prove): products of 8-bit vectors compared with a
 * threshold where they arise, so that the sums, four bytes a pair, never reach memory; and float32 products of chosen
 * pairs. Called with buffers of NumPy arrays and without the GIL, so threads share out the queries.
 *
 * n queries, m documents (a multiple of 64), d dimensions, w = d rounded up to 4. Documents are stored 64 by 64: for
 * every four dimensions the 64 x 4 bytes that one VNNI instruction per 16 documents reads, each code + 128, because
 * the instruction multiplies unsigned by signed bytes. 128 times the sum of the query's codes is taken off again.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_KERNEL 1
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#else
#define HAVE_KERNEL 0
#define TARGET
#endif

#define DOCUMENTS 64 /* of a block: four registers of sums */
#define QUERIES 6    /* at a time: 24 registers of sums, 4 of documents, of the 32 there are */

typedef struct {
    Py_ssize_t queries, width, room, blocks;
    const int8_t *codes;       /* [n, w] */
    const uint8_t *packed;     /* [m / 64, w / 4, 64, 4] */
    const float *scales;       /* [m] */
    const float *residuals;    /* [m], -inf at padding */
    const float *lengths;      /* [m] */
    const int32_t *offsets;    /* [n] 128 x sum of codes */
    const float *per_residual; /* [n] */
    const float *per_length;   /* [n] */
    const float *needed;       /* [n] */
    int32_t *counts;           /* [n] */
    int32_t *rows;             /* [n, room] */
    float *uppers;             /* [n, room] */
} Scan;

typedef struct {
    Py_ssize_t queries, dimensions, room, wanted;
    const float *asked;     /* [n, d] */
    const float *documents; /* [m, d] */
    const float *errors;    /* [n] of a product here */
    const float *units;     /* [n] the uppers' */
    int32_t *counts;        /* [n] */
    int32_t *rows;          /* [n, room] */
    float *uppers;          /* [n, room] */
    float *thresholds;      /* [n] */
    float *needed;          /* [n] the threshold in the uppers' unit */
    float *scratch;         /* [room] */
} Learn;

#if HAVE_KERNEL

TARGET static int take(const Scan *s, Py_ssize_t query, Py_ssize_t block, const __m512i *sums) {
    const __m512i offset = _mm512_set1_epi32(s->offsets[query]);
    const __m512 per_residual = _mm512_set1_ps(s->per_residual[query]);
    const __m512 per_length = _mm512_set1_ps(s->per_length[query]);
    const __m512 needed = _mm512_set1_ps(s->needed[query]);
    int32_t count = s->counts[query];
    for (int part = 0; part < 4; part++) {
        const Py_ssize_t first = block * DOCUMENTS + part * 16;
        __m512 upper = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[part], offset)), _mm512_loadu_ps(s->scales + first));
        upper = _mm512_fmadd_ps(per_residual, _mm512_loadu_ps(s->residuals + first), upper);
        upper = _mm512_fmadd_ps(per_length, _mm512_loadu_ps(s->lengths + first), upper);
        const __mmask16 hit = _mm512_cmp_ps_mask(upper, needed, _CMP_GE_OQ);
        if (hit) {
            const __m512i row = _mm512_add_epi32(_mm512_set1_epi32((int32_t)first),
                                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            _mm512_mask_compressstoreu_epi32(s->rows + query * s->room + count, hit, row);
            _mm512_mask_compressstoreu_ps(s->uppers + query * s->room + count, hit, upper);
            count += __builtin_popcount(hit);
        }
    }
    s->counts[query] = count;
    return count + DOCUMENTS > s->room;
}

/* Blocks from first on, until all are done or a query has no room for another block: the block to go on with. */
TARGET static Py_ssize_t scan_blocks(const Scan *s, Py_ssize_t first) {
    const Py_ssize_t quads = s->width / 4;
    for (Py_ssize_t block = first; block < s->blocks; block++) {
        const uint8_t *documents = s->packed + block * s->width * DOCUMENTS;
        int full = 0;
        for (Py_ssize_t query = 0; query < s->queries; query += QUERIES) {
            const int8_t *codes = s->codes + query * s->width;
            /* Not what is handed on below: whose address is taken does not stay in registers. */
            __m512i acc[QUERIES][4], sums[QUERIES][4];
            for (int q = 0; q < QUERIES; q++)
                for (int part = 0; part < 4; part++) acc[q][part] = _mm512_setzero_si512();
            for (Py_ssize_t quad = 0; quad < quads; quad++) {
                const uint8_t *at = documents + quad * 4 * DOCUMENTS;
                const __m512i d0 = _mm512_loadu_si512(at), d1 = _mm512_loadu_si512(at + 64);
                const __m512i d2 = _mm512_loadu_si512(at + 128), d3 = _mm512_loadu_si512(at + 192);
                for (int q = 0; q < QUERIES; q++) {
                    int32_t four;
                    __builtin_memcpy(&four, codes + q * s->width + quad * 4, 4);
                    const __m512i asked = _mm512_set1_epi32(four);
                    acc[q][0] = _mm512_dpbusd_epi32(acc[q][0], d0, asked);
                    acc[q][1] = _mm512_dpbusd_epi32(acc[q][1], d1, asked);
                    acc[q][2] = _mm512_dpbusd_epi32(acc[q][2], d2, asked);
                    acc[q][3] = _mm512_dpbusd_epi32(acc[q][3], d3, asked);
                }
            }
            for (int q = 0; q < QUERIES; q++)
                for (int part = 0; part < 4; part++) sums[q][part] = acc[q][part];
            for (int q = 0; q < QUERIES; q++) full |= take(s, query + q, block, sums[q]);
        }
        if (full) return block + 1;
    }
    return s->blocks;
}

TARGET static float dot(const float *a, const float *b, Py_ssize_t d) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    Py_ssize_t i = 0;
    for (; i + 64 <= d; i += 64) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
        s2 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 32), _mm512_loadu_ps(b + i + 32), s2);
        s3 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 48), _mm512_loadu_ps(b + i + 48), s3);
    }
    for (; i < d; i += 16) {
        const __mmask16 rest = d - i < 16 ? (__mmask16)((1u << (d - i)) - 1) : (__mmask16)0xffff;
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(rest, a + i), _mm512_maskz_loadu_ps(rest, b + i), s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

/* The k-th largest of the first n values, which are reordered (Hoare's selection). */
static float kth_largest(float *values, Py_ssize_t n, Py_ssize_t k) {
    Py_ssize_t low = 0, high = n - 1;
    while (low < high) {
        const float pivot = values[low + (high - low) / 2];
        Py_ssize_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i <= j) {
                const float held = values[i];
                values[i++] = values[j];
                values[j--] = held;
            }
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
    return values[k - 1];
}

/* Documents lie anywhere, so the next one but one is fetched while this one is multiplied. */
TARGET static float product(const Learn *s, Py_ssize_t query, const int32_t *row, const int32_t *end) {
    if (row + 2 < end) {
        const char *ahead = (const char *)(s->documents + (Py_ssize_t)row[2] * s->dimensions);
        for (Py_ssize_t byte = 0; byte < s->dimensions * 4; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
    }
    return dot(s->asked + query * s->dimensions, s->documents + (Py_ssize_t)*row * s->dimensions, s->dimensions);
}

/* Raise each threshold to what the most promising k reach for certain, and drop who cannot reach it. */
TARGET static void learn_thresholds(const Learn *s) {
    for (Py_ssize_t query = 0; query < s->queries; query++) {
        int32_t *rows = s->rows + query * s->room;
        float *uppers = s->uppers + query * s->room;
        const int32_t count = s->counts[query];
        if (count < s->wanted) continue;
        __builtin_memcpy(s->scratch, uppers, sizeof(float) * count);
        const float promising = kth_largest(s->scratch, count, s->wanted);
        float least = __builtin_inff();
        Py_ssize_t seen = 0;
        for (int32_t i = 0; i < count && seen < s->wanted; i++) {
            if (uppers[i] < promising) continue;
            const float found = product(s, query, rows + i, rows + i + 1);
            if (found < least) least = found;
            seen++;
        }
        if (least - s->errors[query] > s->thresholds[query]) s->thresholds[query] = least - s->errors[query];
        /* The division rounds, so a step down. */
        const float needed = s->thresholds[query] / s->units[query];
        s->needed[query] = needed - __builtin_fabsf(needed) * 0x1p-22f;
        int32_t kept = 0;
        for (int32_t i = 0; i < count; i++)
            if (uppers[i] >= s->needed[query]) {
                rows[kept] = rows[i];
                uppers[kept++] = uppers[i];
            }
        s->counts[query] = kept;
    }
}

/* Keep the nominees whose products do not lie below the k-th best by more than both products' errors. */
TARGET static void choose(const Learn *s) {
    for (Py_ssize_t query = 0; query < s->queries; query++) {
        int32_t *rows = s->rows + query * s->room;
        float *products = s->uppers + query * s->room;
        const int32_t count = s->counts[query];
        if (count <= s->wanted) continue;
        for (int32_t i = 0; i < count; i++) products[i] = product(s, query, rows + i, rows + count);
        __builtin_memcpy(s->scratch, products, sizeof(float) * count);
        const float least = kth_largest(s->scratch, count, s->wanted) - 2 * s->errors[query];
        int32_t kept = 0;
        for (int32_t i = 0; i < count; i++)
            if (products[i] >= least) rows[kept++] = rows[i];
        s->counts[query] = kept;
    }
}

static int is_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

#else

static Py_ssize_t scan_blocks(const Scan *s, Py_ssize_t first) { return first + 0 * s->blocks; }
static void learn_thresholds(const Learn *s) { (void)s; }
static void choose(const Learn *s) { (void)s; }
static int is_supported(void) { return 0; }

#endif

/* Queries: those whose counts, rows and uppers are kept, of which the last (n % 6 made up) may need infinity. */
static PyObject *scan(PyObject *module, PyObject *args) {
    Py_buffer b[12] = {{0}};
    Py_ssize_t first;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*y*w*w*w*n", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &b[8],
                          &b[9], &b[10], &b[11], &first))
        return NULL;
    const Py_ssize_t n = b[5].len / 4, m = b[2].len / 4;
    const Py_ssize_t width = n ? b[0].len / n : 0, room = n ? b[10].len / 4 / n : 0;
    if (!is_supported()) {
        PyErr_SetString(PyExc_RuntimeError, "this CPU has no AVX-512 VNNI");
    } else if (n % QUERIES || m % DOCUMENTS || width % 4 || b[0].len != n * width || b[1].len != m * width || b[3].len != m * 4 ||
               b[4].len != m * 4 || b[6].len != n * 4 || b[7].len != n * 4 || b[8].len != n * 4 || b[9].len != n * 4 ||
               b[10].len != n * room * 4 || b[11].len != n * room * 4 || room < DOCUMENTS || first < 0 || m > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "scan: the buffers' sizes do not belong together");
    } else {
        const Scan s = {n, width, room, m / DOCUMENTS, b[0].buf, b[1].buf, b[2].buf, b[3].buf, b[4].buf, b[5].buf,
                        b[6].buf, b[7].buf, b[8].buf, b[9].buf, b[10].buf, b[11].buf};
        Py_ssize_t next;
        Py_BEGIN_ALLOW_THREADS next = scan_blocks(&s, first);
        Py_END_ALLOW_THREADS result = PyLong_FromSsize_t(next);
    }
    for (int i = 0; i < 12; i++) PyBuffer_Release(&b[i]);
    return result;
}

static PyObject *look(PyObject *args, void (*work)(const Learn *)) {
    Py_buffer b[9] = {{0}};
    Py_ssize_t wanted;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*w*w*w*w*n", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &b[8], &wanted))
        return NULL;
    const Py_ssize_t n = b[2].len / 4, d = n ? b[0].len / 4 / n : 0, room = n ? b[5].len / 4 / n : 0;
    float *scratch = PyMem_Malloc(sizeof(float) * (room + 1));
    if (!is_supported()) {
        PyErr_SetString(PyExc_RuntimeError, "this CPU has no AVX-512 VNNI");
    } else if (!scratch) {
        PyErr_NoMemory();
    } else if (b[0].len != n * d * 4 || (d && b[1].len % (d * 4)) || b[3].len != n * 4 || b[4].len != n * 4 ||
               b[5].len != n * room * 4 || b[6].len != b[5].len || b[7].len != n * 4 || b[8].len != n * 4 || wanted < 1) {
        PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not belong together");
    } else {
        const Learn s = {n, d, room, wanted, b[0].buf, b[1].buf, b[2].buf, b[3].buf, b[4].buf,
                         b[5].buf, b[6].buf, b[7].buf, b[8].buf, scratch};
        Py_BEGIN_ALLOW_THREADS work(&s);
        Py_END_ALLOW_THREADS result = Py_NewRef(Py_None);
    }
    PyMem_Free(scratch);
    for (int i = 0; i < 9; i++) PyBuffer_Release(&b[i]);
    return result;
}

static PyObject *learn(PyObject *module, PyObject *args) { return look(args, learn_thresholds); }

static PyObject *finish(PyObject *module, PyObject *args) { return look(args, choose); }

static PyObject *supported(PyObject *module, PyObject *unused) { return PyBool_FromLong(is_supported()); }

static PyMethodDef methods[] = {
    {"scan", scan, METH_VARARGS, "scan(codes, packed, scales, residuals, lengths, offsets, per_residual, per_length, needed, counts, rows, uppers, first) -> next block"},
    {"learn", learn, METH_VARARGS, "learn(queries, documents, errors, units, counts, rows, uppers, thresholds, needed, k)"},
    {"finish", finish, METH_VARARGS, "finish: the same arguments; counts and rows of who stays, uppers spent"},
    {"supported", supported, METH_NOARGS, "Whether this CPU has AVX-512 VNNI."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_nominate", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__nominate(void) { return PyModule_Create(&definition); }
