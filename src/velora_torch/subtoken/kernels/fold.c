/* W <- round(decay * W + coef (x) e) in one pass over W (see fold.py).
 *
 * Shapes: O output features, D input features, G groups, M features per sub-token; the last group
 * may be cut (D <= G M). Matrices lie row after row. The sum is that of PyTorch's operators:
 * decay * W is rounded to float32, and the product is added with one rounding.
 *
 * bfloat16 is the upper half of float32. Stochastic rounding adds noise a[o] ^ b[d], uniform in
 * [0, 2^16), to the float's bits and cuts them; without a, the nearest value is taken, even ones at
 * ties. Infinities stay, and every NaN becomes one whose bits cannot carry into the sign.
 */
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float widen(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint16_t add_noise(float x, int32_t noise) {
    return x == x ? (uint16_t)((bits_of(x) + (uint32_t)noise) >> 16) : 0x7FC0;
}

INLINE uint16_t nearest(float x) {
    return add_noise(x, 0x7FFF + (int32_t)(bits_of(x) >> 16 & 1));
}

/* One output's features, group by group; with a constant M the inner loop is unrolled. */

INLINE void row_bf16(uint16_t *restrict w_D, const float *restrict c_G, const float *restrict e_D,
                     int noisy, int32_t a, const int32_t *restrict b_D, float decay, long groups,
                     long M) {
    for (long g = 0; g < groups; g++)
        for (long m = 0; m < M; m++) {
            const long d = g * M + m;
            const float sum = __builtin_fmaf(c_G[g], e_D[d], widen(w_D[d]) * decay);
            w_D[d] = noisy ? add_noise(sum, a ^ b_D[d]) : nearest(sum);
        }
}

INLINE void row_f32(float *restrict w_D, const float *restrict c_G, const float *restrict e_D,
                    float decay, long groups, long M) {
    for (long g = 0; g < groups; g++)
        for (long m = 0; m < M; m++) {
            const long d = g * M + m;
            w_D[d] = __builtin_fmaf(c_G[g], e_D[d], w_D[d] * decay);
        }
}

#define FOR_SIZE(M, CALL)                                                                          \
    switch (M) {                                                                                   \
    case 2: CALL(2); break;                                                                        \
    case 4: CALL(4); break;                                                                        \
    case 8: CALL(8); break;                                                                        \
    case 16: CALL(16); break;                                                                      \
    case 32: CALL(32); break;                                                                      \
    default: CALL(M);                                                                              \
    }

void fold_bf16(uint16_t *w_OD, const float *c_OG, const float *e_D, const int32_t *a_O,
               const int32_t *b_D, float decay, long O, long D, long G, long M, int threads) {
    const long groups = D / M, last = D % M;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < O; o++) {
        uint16_t *w_D = w_OD + o * D;
        const float *c_G = c_OG + o * G;
        const int32_t a = a_O ? a_O[o] : 0;
#define WHOLE(SIZE)                                                                                \
    if (a_O)                                                                                       \
        row_bf16(w_D, c_G, e_D, 1, a, b_D, decay, groups, SIZE);                                   \
    else                                                                                           \
        row_bf16(w_D, c_G, e_D, 0, a, b_D, decay, groups, SIZE)
        FOR_SIZE(M, WHOLE)
#undef WHOLE
        if (last)
            row_bf16(w_D + D - last, c_G + groups, e_D + D - last, a_O != 0, a,
                     a_O ? b_D + D - last : b_D, decay, 1, last);
    }
}

void fold_f32(float *w_OD, const float *c_OG, const float *e_D, float decay, long O, long D, long G,
              long M, int threads) {
    const long groups = D / M, last = D % M;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < O; o++) {
        float *w_D = w_OD + o * D;
        const float *c_G = c_OG + o * G;
#define WHOLE(SIZE) row_f32(w_D, c_G, e_D, decay, groups, SIZE)
        FOR_SIZE(M, WHOLE)
#undef WHOLE
        if (last)
            row_f32(w_D + D - last, c_G + groups, e_D + D - last, decay, 1, last);
    }
}

/* The same for a weight that is stored as (D, O), with coefficients as (G, O). */

INLINE void column_bf16(uint16_t *restrict w_O, const float *restrict c_O, float e, int noisy,
                        const int32_t *restrict a_O, int32_t b, float decay, long O) {
    for (long o = 0; o < O; o++) {
        const float sum = __builtin_fmaf(c_O[o], e, widen(w_O[o]) * decay);
        w_O[o] = noisy ? add_noise(sum, a_O[o] ^ b) : nearest(sum);
    }
}

INLINE void column_f32(float *restrict w_O, const float *restrict c_O, float e, float decay,
                       long O) {
    for (long o = 0; o < O; o++)
        w_O[o] = __builtin_fmaf(c_O[o], e, w_O[o] * decay);
}

void fold_transposed_bf16(uint16_t *w_DO, const float *c_GO, const float *e_D, const int32_t *a_O,
                          const int32_t *b_D, float decay, long O, long D, long M, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long d = 0; d < D; d++)
        if (a_O)
            column_bf16(w_DO + d * O, c_GO + d / M * O, e_D[d], 1, a_O, b_D[d], decay, O);
        else
            column_bf16(w_DO + d * O, c_GO + d / M * O, e_D[d], 0, a_O, 0, decay, O);
}

void fold_transposed_f32(float *w_DO, const float *c_GO, const float *e_D, float decay, long O,
                         long D, long M, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long d = 0; d < D; d++)
        column_f32(w_DO + d * O, c_GO + d / M * O, e_D[d], decay, O);
}
