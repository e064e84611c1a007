// Counter-based random numbers shared by every kernel on every device.
//
// A draw is a pure function of (seed, sequence, position, step, index): the same bits on CPU and CUDA, in any
// batch, on any instruction set. All floating point below is spelled out in fmaf so that no compiler may contract
// it differently; build without -ffast-math.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define UNMASK_HD __host__ __device__ __forceinline__
#else
#define UNMASK_HD inline __attribute__((always_inline))
#endif

namespace unmask {

// Which draw within (sequence, position, step): vocabulary draws use index = token / 4 (word token % 4); draws of
// actions use these, above any vocabulary.
constexpr uint32_t kActionIndex = 0x80000000u;  // word 0: the position's own action draw
constexpr uint32_t kStopIndex = 0x80000001u;    // word 0: the STOP option of DPLS, at position 0

struct Philox4 {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
UNMASK_HD Philox4 philox4x32(uint64_t seed, uint32_t index, uint32_t position, uint32_t step, uint32_t sequence) {
  uint32_t c0 = index, c1 = position, c2 = step, c3 = sequence;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Whose draws: all but the index.
struct DrawKey {
  uint64_t seed;
  uint32_t sequence, position, step;

  UNMASK_HD Philox4 words(uint32_t index) const { return philox4x32(seed, index, position, step, sequence); }
};

// Uniform in (0, 1): fine resolution near 0 (2^-33), at most 1 - 2^-24.
UNMASK_HD float uniform(uint32_t bits) {
  const float u = fmaf(static_cast<float>(bits), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  return u < 0.99999994f ? u : 0.99999994f;
}

// The polynomial in x whose coefficients are given, highest power first.
template <typename... Coefficients>
UNMASK_HD float polynomial(float x, float sum, Coefficients... rest) {
  ((sum = fmaf(sum, x, rest)), ...);
  return sum;
}

// Natural logarithm of a positive normal float, correct to about 1 ulp, by the same fmaf chain everywhere.
UNMASK_HD float log_exact(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const int32_t shifted = static_cast<int32_t>(bits - 0x3f3504f3u);  // mantissa into [sqrt(1/2), sqrt(2))
  const int32_t exponent = shifted >> 23;
  bits = bits - (static_cast<uint32_t>(exponent) << 23);
  float m;
  memcpy(&m, &bits, 4);
  const float f = m - 1.0f;
  const float p = polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                             1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                             3.3333331174e-1f);  // Cephes logf
  const float z = f * f;
  const float e = static_cast<float>(exponent);
  float y = f * z * p;
  y = fmaf(e, -2.12194440e-4f, y);
  y = fmaf(z, -0.5f, y);
  return fmaf(e, 0.693359375f, f + y);
}

// Standard exponential draw -log(1 - v) for v = uniform(bits); accurate for small v.
UNMASK_HD float exponential(uint32_t bits) {
  const float v = uniform(bits);
  // log1p(-v): for small v the series is exact to rounding, else 1 - v loses nothing that matters.
  if (v < 0.00048828125f) return v * polynomial(v, 0.33333334f, 0.5f, 1.0f);
  return -log_exact(1.0f - v);
}

// Standard Gumbel draw; at most about 22.9.
UNMASK_HD float gumbel(uint32_t bits) { return -log_exact(exponential(bits)); }
constexpr float kGumbelMax = 23.0f;

}  // namespace unmask
