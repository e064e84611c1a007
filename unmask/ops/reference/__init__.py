"""The ops in plain torch: they run where there is no kernel, and in float64 they say what kernels must compute.

The functions take the arguments of ``torch.ops.unmask.*``, check them as the kernels do, and never wait for a device.
"""

from unmask.ops.reference.calm_ import calm_
from unmask.ops.reference.choose import choose
from unmask.ops.reference.policy_forward import policy_forward
from unmask.ops.reference.prepare import prepare
from unmask.ops.reference.select_set import select_set
from unmask.ops.reference.topk_confidence import topk_confidence
from unmask.ops.reference.unmask_ import unmask_

__all__ = ["calm_", "choose", "policy_forward", "prepare", "select_set", "topk_confidence", "unmask_"]
