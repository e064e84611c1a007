// topk_confidence for the baseline instruction set of the machine.
#include <math.h>
#include <stdint.h>

#include "ops/random.h"
#include "ops/topk_confidence.h"

#define UNMASK_ISA_LEVEL 0
#include "cpu/isa_begin.h"
#include "cpu/topk_confidence_kernel.h"
#include "cpu/isa_end.h"
