// Vectors of UNMASK_LANES 32-bit numbers in GCC's vector extension; included once per instruction set, see isa.h.
// a + b, a < b, a & b, c ? a : b and a[i] are the compiler's; a comparison gives vi lanes of 0 or -1.
namespace unmask::cpu::UNMASK_ISA {

#define UNMASK_INLINE static inline __attribute__((always_inline, unused))

constexpr int kLanes = UNMASK_LANES;
constexpr float kLog2E = 1.44269504088896340736f;
typedef float vf __attribute__((vector_size(UNMASK_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(UNMASK_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(UNMASK_LANES * 4)));
typedef float vf_unaligned __attribute__((vector_size(UNMASK_LANES * 4), aligned(4), may_alias));

UNMASK_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
UNMASK_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
UNMASK_INLINE vf splat(float x) { return x - (vf){}; }
UNMASK_INLINE vu splat_uint(uint32_t x) { return x - (vu){}; }

// What the instruction sets have instructions of their own for:
//   mul_add       a * b + c, fused where that exists, else rounded twice
//   maximum, minimum   of each lane; the second argument's where one of them is NaN
//   any           whether a condition holds in some lane
//   multiply_wide high and low halves of the 64-bit products of the lanes with a constant
//   exp2_table    the bits of 2^(j / S) as a float, for j = 0 .. S - 1, less those of 1.0 and of j / S in the mantissa's
//                 place: what has to be added to the bits of 1 + j / S
//   lookup        table[index modulo S] in each lane
#if UNMASK_LANES == 16
UNMASK_INLINE vf mul_add(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
UNMASK_INLINE vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
UNMASK_INLINE vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
UNMASK_INLINE bool any(vi condition) { return _mm512_movepi32_mask((__m512i)condition) != 0; }
UNMASK_INLINE void multiply_wide(vu a, uint32_t constant, vu* high, vu* low) {
  const __m512i k = _mm512_set1_epi32((int)constant);
  const __m512i even = _mm512_mul_epu32((__m512i)a, k);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), k);
  *low = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  *high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
constexpr int kTableBits = 4;
UNMASK_INLINE vi exp2_table() {
  return (vi){0,       -152893, -289342, -408621, -509968, -592590, -655657, -698305,
              -719629, -718684, -694486, -646004, -572163, -471841, -343865, -187011};
}
UNMASK_INLINE vi lookup(vi table, vi index) { return (vi)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table); }
#elif UNMASK_LANES == 8
UNMASK_INLINE vf mul_add(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
UNMASK_INLINE vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
UNMASK_INLINE vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
UNMASK_INLINE bool any(vi condition) { return _mm256_movemask_ps((__m256)condition) != 0; }
UNMASK_INLINE void multiply_wide(vu a, uint32_t constant, vu* high, vu* low) {
  const __m256i k = _mm256_set1_epi32((int)constant);
  const __m256i even = _mm256_mul_epu32((__m256i)a, k);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), k);
  *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
constexpr int kTableBits = 3;
UNMASK_INLINE vi exp2_table() { return (vi){0, -289342, -509968, -655657, -719629, -694486, -572163, -343865}; }
UNMASK_INLINE vi lookup(vi table, vi index) { return (vi)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index); }
#else
UNMASK_INLINE vf mul_add(vf a, vf b, vf c) { return a * b + c; }
UNMASK_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
UNMASK_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
UNMASK_INLINE bool any(vi condition) { return (condition[0] | condition[1] | condition[2] | condition[3]) != 0; }
UNMASK_INLINE void multiply_wide(vu a, uint32_t constant, vu* high, vu* low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(constant) * a[i];
    (*low)[i] = static_cast<uint32_t>(product);
    (*high)[i] = static_cast<uint32_t>(product >> 32);
  }
}
#endif

UNMASK_INLINE float horizontal_max(vf v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

UNMASK_INLINE double horizontal_sum(vf v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// The polynomial in x whose coefficients are given, highest power first.
template <typename... Coefficients>
UNMASK_INLINE vf polynomial(vf x, float first, Coefficients... rest) {
  vf sum = splat(first);
  ((sum = mul_add(sum, x, splat(rest))), ...);
  return sum;
}

// 2^(f / S) for f on [-1/2, 1/2], exact at 0; relative error 4e-7 of either sign alike (16 lanes), 2e-7 (8).
#if UNMASK_LANES == 16
UNMASK_INLINE vf exp2_near_one(vf f) { return polynomial(f, 9.383848e-4f, 4.33242396e-2f, 1.0f); }
#else
UNMASK_INLINE vf exp2_near_one(vf f) { return polynomial(f, 1.0841004e-4f, 3.7535391e-3f, 8.6643398e-2f, 1.0f); }
#endif

// 2^f on [-1/2, 1/2]; relative error 9e-8 before rounding, exact at 0.
UNMASK_INLINE vf exp2_polynomial(vf f) {
  return polynomial(f, 1.326469355e-3f, 9.671514854e-3f, 5.550733954e-2f, 2.402224243e-1f, 6.931470037e-1f, 1.0f);
}

// A number as the product of one near 1 and a power of two, roughly.
struct Product {
  vf near_one, power;
};

// 2^x for x from -127 to 127: 0 below about -126.5, NaN for NaN. Relative error below 2e-7.
UNMASK_INLINE Product exp2_product(vf x) {
  // Adding 1.5 * 2^23 + 127 leaves round(x) + 127, the biased exponent of the result, in the lowest bits.
  const vf shifted = x + 12583039.0f;
  const vf f = x - (shifted - 12583039.0f);  // in [-1/2, 1/2]
  return {exp2_polynomial(f), (vf)((vi)shifted << 23)};
}

// The same for x up to 127, multiplied out.
UNMASK_INLINE vf exp2_fast(vf x) {
  const Product product = exp2_product(maximum(splat(-127.0f), x));
  return product.near_one * product.power;
}

// philox4x32 of csrc/ops/random.h for kLanes values of index.
UNMASK_INLINE void philox_lanes(const DrawKey& key, vu index, vu word[4]) {
  vu c0 = index, c1 = splat_uint(key.position), c2 = splat_uint(key.step), c3 = splat_uint(key.sequence);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, &high0, &low0);
    multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

// Lanes with an even and with an odd place in the sequence a, b.
UNMASK_INLINE void deinterleave(vf a, vf b, vf* even, vf* odd) {
#if defined(__clang__)  // has no shuffle by a variable, but makes shuffles of this loop, which GCC does not
  vf e, o;
  for (int i = 0, half = kLanes / 2; i < half; ++i) {
    e[i] = a[2 * i];
    o[i] = a[2 * i + 1];
    e[i + half] = b[2 * i];
    o[i + half] = b[2 * i + 1];
  }
  *even = e;
  *odd = o;
#else
  vi e = {};
  for (int i = 0; i < kLanes; ++i) e[i] = 2 * i;
  *even = __builtin_shuffle(a, b, e);
  *odd = __builtin_shuffle(a, b, e + 1);
#endif
}

}  // namespace unmask::cpu::UNMASK_ISA
