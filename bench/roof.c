/* The roof: what vectors, threads and stores past the cache make of this machine.

   Every function takes the number of threads, and whether to store past the cache
   ("stream").  Arrays are aligned to their elements only, so the head and the tail of
   what a thread works on are done one element at a time. */

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 vec;
#define LOAD _mm512_loadu_ps
#define STORE _mm512_store_ps
#define STREAM _mm512_stream_ps
#define FENCE _mm_sfence
static inline vec positive(vec x, vec value)
{
    return _mm512_maskz_mov_ps(
        _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), value);
}
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
typedef __m256 vec;
#define LOAD _mm256_loadu_ps
#define STORE _mm256_store_ps
#define STREAM _mm256_stream_ps
#define FENCE _mm_sfence
static inline vec positive(vec x, vec value)
{
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), value);
}
#else /* the compiler's vectors, and no stores past the cache */
#define LANES 1
typedef float vec;
static inline vec LOAD(const float *x) { return *x; }
static inline void STORE(float *y, vec value) { *y = value; }
#define STREAM STORE
static inline void FENCE(void) {}
static inline vec positive(vec x, vec value) { return x > 0 ? value : 0; }
#endif

/* y[i] = SCALAR, LANES at a time y[i..] = VECTOR, in equal shares for the threads. */
#define LOOP(VECTOR, SCALAR)                                                      \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")             \
    for (int part = 0; part < threads; part++) {                                  \
        ptrdiff_t i = n * part / threads, end = n * (part + 1) / threads;         \
        for (; i < end && (uintptr_t)(y + i) % sizeof(vec); i++) y[i] = SCALAR;   \
        if (stream) {                                                             \
            for (; i + LANES <= end; i += LANES) STREAM(y + i, VECTOR);           \
            FENCE();                                                              \
        } else {                                                                  \
            for (; i + LANES <= end; i += LANES) STORE(y + i, VECTOR);            \
        }                                                                         \
        for (; i < end; i++) y[i] = SCALAR;                                       \
    }

void copy(float *y, const float *x, const float *g, ptrdiff_t n, int threads,
          int stream)
{
    (void)g;
    LOOP(LOAD(x + i), x[i])
}

void relu(float *y, const float *x, const float *g, ptrdiff_t n, int threads,
          int stream)
{
    (void)g;
    LOOP(positive(LOAD(x + i), LOAD(x + i)), x[i] > 0 ? x[i] : 0)
}

void relu_backward(float *y, const float *x, const float *g, ptrdiff_t n, int threads,
                   int stream)
{
    LOOP(positive(LOAD(x + i), LOAD(g + i)), x[i] > 0 ? g[i] : 0)
}
