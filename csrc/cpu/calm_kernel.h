// The pass over the logits of calm_, for one instruction set, see isa.h: the divergence of softmax(x) from softmax(y) is
//   sum e^x (x - y) / sum e^x - log sum e^x + log sum e^y,
// with exponentials relative to the maxima, which a first pass finds.
namespace unmask::cpu::UNMASK_ISA {

// The chunk from id `first` on; a copy, with -inf in these places, where it sticks out of its row or has the excluded id.
template <typename Type>
static const typename Type::Element* chunk_of(const CalmParams& p, const typename Type::Element* row, int64_t first,
                                              typename Type::Element* copy) {
  const bool excludes = p.excluded >= first && p.excluded < first + kChunk;
  if (!excludes && first + kChunk <= p.vocab) return row + first;
  for (int i = 0; i < kChunk; ++i) {
    copy[i] = first + i < p.vocab && first + i != p.excluded ? row[first + i] : Type::kLowest;
  }
  return copy;
}

template <typename Type>
static float compare_rows(const CalmParams& p, const typename Type::Element* x, typename Type::Element* y) {
  typename Type::Element copy[kChunk];
  vf v[4], w[4], top_v[4], top_w[4];
  for (int n = 0; n < 4; ++n) top_v[n] = top_w[n] = splat(kMinusInfinity);
  for (int64_t i = 0; i < p.vocab; i += kChunk) {
    Type::load4(chunk_of<Type>(p, x, i, copy), v);
    Type::load4(chunk_of<Type>(p, y, i, copy), w);
    for (int n = 0; n < 4; ++n) {
      top_v[n] = maximum(v[n], top_v[n]);
      top_w[n] = maximum(w[n], top_w[n]);
    }
  }
  const float top_x = horizontal_max(largest_of(top_v)), top_y = horizontal_max(largest_of(top_w));
  double sum_x = 0.0, sum_y = 0.0, weighted = 0.0;
  for (int64_t block = 0; block < p.vocab; block += kBlock) {
    vf block_x[4] = {}, block_y[4] = {}, block_weighted[4] = {};
    for (int64_t i = block; i < p.vocab && i < block + kBlock; i += kChunk) {
      Type::load4(chunk_of<Type>(p, x, i, copy), v);
      Type::load4(chunk_of<Type>(p, y, i, copy), w);
      for (int n = 0; n < 4; ++n) {
        const vf e = exp2_fast((v[n] - top_x) * kLog2E);
        block_x[n] += e;
        block_y[n] += exp2_fast((w[n] - top_y) * kLog2E);
        block_weighted[n] += e > 0.0f ? e * (v[n] - w[n]) : splat(0.0f);
      }
    }
    sum_x += horizontal_sum(add_up(block_x));
    sum_y += horizontal_sum(add_up(block_y));
    weighted += horizontal_sum(add_up(block_weighted));
  }
  __builtin_memcpy(y, x, static_cast<size_t>(p.vocab) * sizeof(*x));
  const double shift = static_cast<double>(top_x) - static_cast<double>(top_y);
  const double divergence = weighted / sum_x - shift - log(sum_x / sum_y);
  return static_cast<float>(divergence < 0.0 ? 0.0 : divergence);
}

template <typename Type>
static float compare_place(const CalmParams& p, int64_t place) {
  using Element = typename Type::Element;
  return compare_rows<Type>(p, static_cast<const Element*>(p.logits) + p.offset(place),
                            static_cast<Element*>(p.previous) + place * p.vocab);
}

float divergence_and_copy(const CalmParams& p, int64_t place) {
  if (p.dtype == DType::kFloat32) return compare_place<Float32>(p, place);
  if (p.dtype == DType::kFloat16) return compare_place<Float16>(p, place);
  return compare_place<BFloat16>(p, place);
}

}  // namespace unmask::cpu::UNMASK_ISA
