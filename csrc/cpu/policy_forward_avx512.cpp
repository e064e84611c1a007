// policy_forward for AVX-512.
#include <math.h>
#include <stdint.h>

#include "cpu/policy_forward_plan.h"
#include "ops/policy_forward.h"

#define UNMASK_ISA_LEVEL 2
#include "cpu/isa_begin.h"
#include "cpu/policy_forward_gemm.h"
#include "cpu/policy_forward_kernel.h"
#include "cpu/isa_end.h"
