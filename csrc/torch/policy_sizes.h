// Which policy networks the kernels take.
#pragma once
#include "checks.h"
#include "ops/policy_forward.h"

namespace unmask {

inline void check_network(const PolicySizes& s) {
  check_value(s.hidden >= 16 && s.hidden <= 256 && s.hidden % 16 == 0, "hidden", s.hidden,
              "a multiple of 16 up to 256");
  check(s.heads >= 1 && s.hidden % s.heads == 0 && (s.hidden / s.heads) % 2 == 0,
        "ValueError: heads: expected hidden / heads to be an even number, got ", s.hidden, " / ", s.heads);
  check_value(s.ffn >= 16 && s.ffn <= 1024 && s.ffn % 16 == 0, "ffn", s.ffn, "a multiple of 16 up to 1024");
  check_value(s.confidences >= 1 && s.confidences <= 64, "confidences", s.confidences, "1 to 64");
}

}  // namespace unmask
