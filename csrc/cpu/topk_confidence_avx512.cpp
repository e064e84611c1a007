// topk_confidence for AVX-512.
#include <math.h>
#include <stdint.h>

#include "ops/random.h"
#include "ops/topk_confidence.h"

#define UNMASK_ISA_LEVEL 2
#include "cpu/isa_begin.h"
#include "cpu/topk_confidence_kernel.h"
#include "cpu/isa_end.h"
