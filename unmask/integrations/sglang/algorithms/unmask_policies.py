"""A module as SGLang's registry looks for them: its attribute ``Algorithm`` is what ``--dllm-algorithm`` can name."""

from unmask.integrations.sglang.algorithm import Unmask as Algorithm

__all__ = ["Algorithm"]
