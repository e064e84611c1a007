// topk_confidence for AVX2, FMA and F16C.
#include <math.h>
#include <stdint.h>

#include "ops/random.h"
#include "ops/topk_confidence.h"

#define UNMASK_ISA_LEVEL 1
#include "cpu/isa_begin.h"
#include "cpu/topk_confidence_kernel.h"
#include "cpu/isa_end.h"
