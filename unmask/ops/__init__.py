"""The ops, compiled for CPU and CUDA and in plain torch for what is left, with their result types."""

from unmask.ops import reference  # registers the ops in plain torch
from unmask.ops.calm_ import calm_
from unmask.ops.choose import Choice, Proposed, choose
from unmask.ops.library import build_info
from unmask.ops.policy_forward import PolicyWeights, policy_forward
from unmask.ops.prepare import Prepared, prepare
from unmask.ops.select_set import Proposals, SetWeights, select_set
from unmask.ops.state import State
from unmask.ops.topk_confidence import TopkConfidence, topk_confidence
from unmask.ops.unmask_ import unmask_

__all__ = [
    "Choice", "PolicyWeights", "Prepared", "Proposals", "Proposed", "SetWeights", "State", "TopkConfidence",
    "build_info", "calm_", "choose", "policy_forward", "prepare", "reference", "select_set",
    "topk_confidence", "unmask_",
]  # fmt: skip
