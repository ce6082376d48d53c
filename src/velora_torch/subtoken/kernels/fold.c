/* W <- round(decay * W + coef (x) e) in one pass over W (see fold.py).
 *
 * Shapes: O output features, D input features, G groups, M features per sub-token; the last group
 * may be cut (D <= G M). Matrices lie row after row. The sum is that of PyTorch's operators:
 * decay * W is rounded to float32, and the product is added with one rounding.
 *
 * 16-bit weights are rounded to nearest, even ones at ties, or, with noise a[o] ^ b[d], uniform in
 * [0, 2^16), up or down with unbiased odds. Infinities stay, and every NaN becomes one.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* What a weight is stored as; fold.py has the same numbers. */
enum type { FLOAT32, BFLOAT16, FLOAT16 };

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* bfloat16 is the upper half of float32: noise is added to its bits, and they are cut. */

INLINE float widen_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t dither_bfloat16(float x, int32_t noise) {
    return x == x ? (uint16_t)((bits_of(x) + (uint32_t)noise) >> 16) : 0x7FC0;
}

INLINE uint16_t nearest_bfloat16(float x) {
    return dither_bfloat16(x, 0x7FFF + (int32_t)(bits_of(x) >> 16 & 1));
}

/* float16 has 10 bits of fraction, and an exponent 112 below float32's. What is smaller than 2^-14
 * is a multiple of 2^-24. */

/* Bits of a float32. */
#define SMALLEST_NORMAL (113u << 23)
#define INFINITE (255u << 23)

/* One of two numbers, without a branch: compilers make loops of it that have none. */
INLINE uint32_t pick(int first, uint32_t one, uint32_t other) {
    const uint32_t all = -(uint32_t)first;
    return (one & all) | (other & ~all);
}

INLINE float widen_float16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7FFF;
    const uint32_t small = bits_of((float)(int32_t)size * 0x1p-24f);
    const uint32_t normal = (size << 13) + (pick(size < 0x7C00, 112, 224) << 23);
    return float_of(sign | pick(size < 0x0400, small, normal));
}

INLINE uint16_t nearest_float16(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, size = bits_of(x) & 0x7FFFFFFF;
    const uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f); /* one bit is 2^-24 */
    const uint32_t normal = (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    const uint32_t finite = pick(size < SMALLEST_NORMAL, small, normal);
    const uint32_t large = pick(size > INFINITE, 0x7E00, 0x7C00); /* NaN, or from 65520 on */
    return (uint16_t)(sign | pick(size < bits_of(65520.0f), finite, large));
}

INLINE uint16_t dither_float16(float x, int32_t noise) {
    const uint32_t power = bits_of(x) & INFINITE;
    /* How far neighbours are apart at x; a power of two, so that all is exact but the last. */
    const uint32_t step = pick(power < SMALLEST_NORMAL, SMALLEST_NORMAL, power) - (10u << 23);
    const float finite = float_of(pick(power < INFINITE, bits_of(x), 0));
    const float steps = finite * float_of((254u << 23) - step); /* less than 2048 of them */
    const float towards_0 = (float)(int32_t)steps, below = towards_0 - (float)(towards_0 > steps);
    const float up = (float)((steps - below) * 0x1p16f > (float)noise + 0.5f);
    const uint32_t rounded = bits_of((below + up) * float_of(step));
    return nearest_float16(float_of(pick(power < INFINITE, rounded, bits_of(x))));
}

INLINE float read(const void *w, long i, enum type type) {
    if (type == FLOAT32)
        return ((const float *)w)[i];
    const uint16_t half = ((const uint16_t *)w)[i];
    return type == BFLOAT16 ? widen_bfloat16(half) : widen_float16(half);
}

INLINE void write(void *w, long i, float x, int noisy, int32_t noise, enum type type) {
    if (type == FLOAT32)
        ((float *)w)[i] = x;
    else if (type == BFLOAT16)
        ((uint16_t *)w)[i] = noisy ? dither_bfloat16(x, noise) : nearest_bfloat16(x);
    else
        ((uint16_t *)w)[i] = noisy ? dither_float16(x, noise) : nearest_float16(x);
}

/* Calls FUNCTION with a type and a noisy that the compiler knows, so that loops have no branches. */
#define FOR_TYPE(type, noisy, FUNCTION, ...)                                                       \
    if (type == FLOAT32)                                                                           \
        FUNCTION(FLOAT32, 0, __VA_ARGS__);                                                         \
    else if (type == BFLOAT16 && noisy)                                                            \
        FUNCTION(BFLOAT16, 1, __VA_ARGS__);                                                        \
    else if (type == BFLOAT16)                                                                     \
        FUNCTION(BFLOAT16, 0, __VA_ARGS__);                                                        \
    else if (noisy)                                                                                \
        FUNCTION(FLOAT16, 1, __VA_ARGS__);                                                         \
    else                                                                                           \
        FUNCTION(FLOAT16, 0, __VA_ARGS__)

/* Some of one output's features, from `first` on, group by group. */
INLINE void groups_of(enum type type, int noisy, void *restrict w_D, const float *restrict c_G,
                      const float *restrict e_D, int32_t a, const int32_t *restrict b_D,
                      float decay, long first, long groups, long M) {
    for (long g = 0; g < groups; g++)
        for (long m = 0; m < M; m++) {
            const long d = first + g * M + m;
            const float sum = __builtin_fmaf(c_G[g], e_D[d], read(w_D, d, type) * decay);
            write(w_D, d, sum, noisy, noisy ? a ^ b_D[d] : 0, type);
        }
}

/* One output's features; with a constant M the inner loop is unrolled. */
INLINE void row(enum type type, int noisy, void *restrict w_D, const float *restrict c_G,
                const float *restrict e_D, int32_t a, const int32_t *restrict b_D, float decay,
                long D, long M) {
    const long whole = D / M, last = D % M;
    switch (M) {
#define UNROLLED(SIZE)                                                                             \
    case SIZE: groups_of(type, noisy, w_D, c_G, e_D, a, b_D, decay, 0, whole, SIZE); break
        UNROLLED(2);
        UNROLLED(4);
        UNROLLED(8);
        UNROLLED(16);
        UNROLLED(32);
#undef UNROLLED
    default: groups_of(type, noisy, w_D, c_G, e_D, a, b_D, decay, 0, whole, M);
    }
    if (last)
        groups_of(type, noisy, w_D, c_G + whole, e_D, a, b_D, decay, D - last, 1, last);
}

/* One feature of a weight that is stored as (D, O). */
INLINE void column(enum type type, int noisy, void *restrict w_O, const float *restrict c_O,
                   float e, const int32_t *restrict a_O, int32_t b, float decay, long O) {
    for (long o = 0; o < O; o++) {
        const float sum = __builtin_fmaf(c_O[o], e, read(w_O, o, type) * decay);
        write(w_O, o, sum, noisy, noisy ? a_O[o] ^ b : 0, type);
    }
}

/* Without a and b the nearest value is taken; float32 has none. */

void fold(int type, void *w_OD, const float *c_OG, const float *e_D, const int32_t *a_O,
          const int32_t *b_D, float decay, long O, long D, long G, long M, int threads) {
    const int noisy = a_O != NULL;
    const long bytes = type == FLOAT32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < O; o++) {
        void *w_D = (char *)w_OD + o * D * bytes;
        const int32_t a = noisy ? a_O[o] : 0;
        FOR_TYPE(type, noisy, row, w_D, c_OG + o * G, e_D, a, b_D, decay, D, M);
    }
}

/* The same for a weight that is stored as (D, O), with coefficients as (G, O). */
void fold_transposed(int type, void *w_DO, const float *c_GO, const float *e_D, const int32_t *a_O,
                     const int32_t *b_D, float decay, long O, long D, long M, int threads) {
    const int noisy = a_O != NULL;
    const long bytes = type == FLOAT32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long d = 0; d < D; d++) {
        void *w_O = (char *)w_DO + d * O * bytes;
        const int32_t b = noisy ? b_D[d] : 0;
        FOR_TYPE(type, noisy, column, w_O, c_GO + d / M * O, e_D[d], a_O, b, decay, O);
    }
}
