// policy_forward for AVX2, FMA and F16C.
#include <math.h>
#include <stdint.h>

#include "cpu/policy_forward_plan.h"
#include "ops/policy_forward.h"

#define UNMASK_ISA_LEVEL 1
#include "cpu/isa_begin.h"
#include "cpu/policy_forward_gemm.h"
#include "cpu/policy_forward_kernel.h"
#include "cpu/isa_end.h"
