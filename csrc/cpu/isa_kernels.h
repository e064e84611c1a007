// The kernels for one instruction set, see isa.h. No include guard.
#include "cpu/simd.h"
#include "cpu/topk_confidence_dtypes.h"
#include "cpu/topk_confidence_kernel.h"
#include "cpu/calm_kernel.h"
#include "cpu/policy_forward_gemm.h"
#include "cpu/policy_layers.h"
#include "cpu/policy_forward_kernel.h"
#include "cpu/select_set_kernel.h"
#undef UNMASK_ISA
#undef UNMASK_LANES
