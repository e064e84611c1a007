"""The three compiled ops, on CPU and CUDA, with their result types."""

from unmask.ops.library import build_info
from unmask.ops.policy_forward import policy_forward
from unmask.ops.topk_confidence import topk_confidence
from unmask.ops.types import PolicyWeights, TopkConfidence
from unmask.ops.unmask_ import unmask_

__all__ = ["PolicyWeights", "TopkConfidence", "build_info", "policy_forward", "topk_confidence", "unmask_"]
