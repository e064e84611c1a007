"""What a set policy could win by stopping better: its own sets, as large as the answer allows.

    python examples/perfect_stop.py --task latin --problems 100

In every step the policy's set is tried at several risks, and a careful decode goes on from each. The largest set from
which the answer is still right is committed; where there is none, the smallest. So the order of the picks is the
policy's, and the stop knows the answers. No way to stop can do better than about this, with this order and these
proposals; what is missing from there on is up to the order and to the language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unmask import Sampler, SamplerConfig
from unmask.evaluation.evaluate import grade
from unmask.evaluation.metrics import mean, standard_error
from unmask.sampling.state import COMPLETE
from unmask.tasks import make_task
from unmask.tasks.base import Problem, Task

RISKS = (8.0, 4.0, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.001)
"""From large sets to small ones."""


class PerfectStop:
    """Decodes problems of ``task`` by ``policy``, with the best of :data:`RISKS` in every step."""

    def __init__(self, task: Task, policy: str, careful: str, config: SamplerConfig) -> None:
        self.task = task
        self.own = Sampler.from_pretrained("little", policy=policy, config=config, dtype="bfloat16")
        self.careful = Sampler(self.own.model, self.own.tokenizer, careful, replace(config, alpha=None))

    @torch.no_grad()
    def __call__(self, problems: Sequence[Problem]) -> tuple[list[float], list[float]]:
        """Grades and forwards, one of each per problem."""
        config = self.own.settled({"seed": 0})
        state = self.own.prepare([p.prompt for p in problems], None, config)
        tokens, attention, start = state.tokens, state.attention, state.start
        forwards, grades = torch.zeros(len(problems)), torch.zeros(len(problems))
        rows = torch.arange(len(problems))
        while len(rows):
            tried = []
            for risk in RISKS:
                given = (tokens[rows].clone(), None if attention is None else attention[rows], start)
                tried.append(self.tried(risk, *given, [problems[row] for row in rows.tolist()]))
            right = torch.stack([one[2] for one in tried]) == 1
            choice = torch.where(right.any(dim=0), right.int().argmax(dim=0), len(RISKS) - 1)
            each = torch.arange(len(rows))
            after, done, value = (torch.stack([one[i] for one in tried])[choice, each] for i in range(3))
            tokens[rows], grades[rows] = after, value.float()
            forwards[rows] += 1
            rows = rows[~done]
        return grades.tolist(), forwards.tolist()

    def tried(
        self, risk: float, tokens: Tensor, attention: Tensor | None, start: int, problems: Sequence[Problem]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step at ``risk``: tokens (N, T) after it, the rows (N,) that it ends, grades (N,) of careful answers."""
        one = self.own.settled({"alpha": risk, "seed": 0, "max_steps": 1})
        state = self.own.new_state(tokens, attention, start, one)
        for _ in self.own.steps(state, one):
            pass
        rest = self.careful.settled({"seed": 0})
        final = self.careful.new_state(state.tokens.clone(), attention, start, rest)
        texts = self.careful.result(final, rest, self.careful.steps(final, rest)).texts or []
        return state.tokens, state.status == COMPLETE, torch.tensor(grade(self.task, problems, texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="latin", help="one task of the packaged model, such as %(default)s")
    parser.add_argument("--problems", type=int, default=100, help="test problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=101, help="of the problems (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="max_new_tokens (default: %(default)s)")
    parser.add_argument("--policy", default="little,hold-eos", help="a set policy (default: %(default)s)")
    parser.add_argument("--careful", default="threshold:0.99,hold-eos", help="how decodes go on (default: %(default)s)")
    args = parser.parse_args()
    task = make_task(args.task)
    config = SamplerConfig(max_new_tokens=args.length, block_length=None, max_batch_size=64)
    grades, forwards = PerfectStop(task, args.policy, args.careful, config)(task.problems(args.problems, args.seed))
    print(
        f"{args.task}: accuracy {mean(grades):.3f} ± {standard_error(grades):.3f}, "
        f"forwards {mean(forwards):.2f} ± {standard_error(forwards):.2f}"
    )


if __name__ == "__main__":
    main()
