// How topk_confidence reads float32, bfloat16 and float16, for one instruction set, see isa.h.
namespace unmask::cpu::UNMASK_ISA {

constexpr int kChunk = 4 * kLanes;    // elements handled together
constexpr int kPrefetchBytes = 4096;  // how far ahead; every line, as leaving some out is worse than none
constexpr int kPageBytes = 4096, kPageAheadBytes = 4 * kPageBytes;

// The dtypes: to_float of one element; load4: kChunk elements, in order or, if kPaired, with those of an even place of
// each half of the chunk in out[0] and out[2], those of an odd place in out[1] and out[3].
struct Float32 {
  typedef float Element;
  static constexpr Element kLowest = -__builtin_inff();
  static constexpr bool kPaired = false;
  UNMASK_INLINE float to_float(Element x) { return x; }
  UNMASK_INLINE void load4(const Element* p, vf out[4]) {
    for (int w = 0; w < 4; ++w) out[w] = load(p + w * kLanes);
  }
};

struct BFloat16 {
  typedef uint16_t Element;
  static constexpr Element kLowest = 0xff80;
  static constexpr bool kPaired = true;
  UNMASK_INLINE float to_float(Element x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  UNMASK_INLINE void load4(const Element* p, vf out[4]) {
    for (int half = 0; half < 2; ++half) {
      vu pair;  // copied: a row of an odd offset is aligned to 2 bytes only
      __builtin_memcpy(&pair, p + half * 2 * kLanes, sizeof(pair));
      out[2 * half] = (vf)(pair << 16);
      out[2 * half + 1] = (vf)(pair & 0xffff0000u);
    }
  }
};

struct Float16 {
  typedef uint16_t Element;
  static constexpr Element kLowest = 0xfc00;
  static constexpr bool kPaired = false;
  UNMASK_INLINE float to_float(Element x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    uint32_t bits = static_cast<uint32_t>(x & 0x7fff) << 13;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' biases; makes subnormals normal too
    __builtin_memcpy(&bits, &f, 4);
    if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= sign;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  UNMASK_INLINE void load4(const Element* p, vf out[4]) {
    for (int w = 0; w < 4; ++w) {
#if UNMASK_LANES == 16
      out[w] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + w * kLanes)));
#elif UNMASK_LANES == 8
      out[w] = (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + w * kLanes)));
#else
      float lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(p[w * kLanes + i]);
      out[w] = load(lanes);
#endif
    }
  }
};

// Loads kChunk elements with out[w][i] = element 4 i + w.
template <typename Type>
UNMASK_INLINE void load_by_four(const typename Type::Element* p, vf out[4]) {
  vf x[4], even[2], odd[2];
  Type::load4(p, x);
  for (int half = 0; half < 2; ++half) {
    if (Type::kPaired) {
      even[half] = x[2 * half];
      odd[half] = x[2 * half + 1];
    } else {
      deinterleave(x[2 * half], x[2 * half + 1], &even[half], &odd[half]);
    }
  }
  deinterleave(even[0], even[1], &out[0], &out[2]);
  deinterleave(odd[0], odd[1], &out[1], &out[3]);
}

// Asks for the memory behind chunk `i` of block `x`: its lines, and once a page a line of a page further on. The address
// of a page not seen before takes a walk through the page's tables, in a virtual machine through two of them, and the
// lines of the page would wait for it one after the other.
template <typename Type>
UNMASK_INLINE void prefetch(const typename Type::Element* x, int i) {
  // As numbers: the addresses may lie behind the logits, where a pointer must not point, though a prefetch may.
  const uintptr_t here = reinterpret_cast<uintptr_t>(x + i);
  constexpr int kPageElements = kPageBytes / sizeof(*x);
  if (i % kPageElements == 0) __builtin_prefetch(reinterpret_cast<const void*>(here + kPageAheadBytes));
  for (size_t byte = 0; byte < kChunk * sizeof(*x); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(here + kPrefetchBytes + byte));
  }
}

}  // namespace unmask::cpu::UNMASK_ISA
