"""Train a policy for someone else's masked language model, AntiBERTy, which fills holes in antibodies.

    pip download antiberty==0.1.3 --no-deps && unzip antiberty-0.1.3-py3-none-any.whl -d runs/wheel
    python examples/antibody.py convert runs/wheel/antiberty/trained_models runs/antiberty
    python examples/antibody.py train runs/antiberty runs/antibody            # 14 minutes on one busy core
    python examples/antibody.py compare runs/antiberty runs/antibody/policy   # beside the rules, paired

AntiBERTy (Ruffolo, Gray and Sulam, arXiv 2112.07782; MIT) has 26 million parameters and predicts masked residues.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from unmask import Sampler, SamplerConfig, load_model
from unmask.tasks import Problem, Task
from unmask.training import SetTrainer, SetTrainerConfig

CLS, SEP, MASK, LETTERS = 2, 3, 4, "ACDEFGHIKLMNPQRSTVWY"
"""AntiBERTy's ids: special tokens, then the residues from 5 on."""
GENES = {
    "train": [
        "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
        "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR",
        "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
        "EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMGIIYPGDSDTRYSPSFQGQVTISADKSISTAYLQWSSLKASDTAMYYCAR",
        "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQ",
        "EIVLTQSPGTLSLSPGERATLSCRASQSVSSSYLAWYQQKPGQAPRLLIYGASSRATGIPDRFSGSGSGTDFTLTISRLEPEDFAVYYCQQ",
    ],
    "test": [
        "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVISYDGSNKYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAR",
        "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKFQGRVTMTRDTSISTAYMELSRLRSDDTAVYYCAR",
        "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYWMSWVRQAPGKGLEWVANIKQDGSEKYYVDSVKGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAR",
        "DIQMTQSPSTLSASVGDRVTITCRASQSISSWLAWYQQKPGKAPKLLIYKASSLESGVPSRFSGSGSGTEFTLTISSLQPDDFATYYCQQ",
        "EIVLTQSPATLSLSPGERATLSCRASQSVSSYLAWYQQKPGQAPRLLIYDASNRATGIPARFSGSGSGTDFTLTISSLEPEDFAVYYCQQ",
    ],
}
"""Public human germline V genes, four heavy and two light ones each: IGHV3-23, 1-69, 4-34, 5-51, IGKV1-39, 3-20;
IGHV3-30, 1-2, 4-59, 3-7, IGKV1-5, 3-11."""
JOINS = {"heavy": ("YFDYWGQGTLVTVSS", "AFDIWGQGTMVTVSS", "YGMDVWGQGTTVTVSS"), "light": ("WTFGQGTKVEIK", "LTFGGGTKVEIK")}


@dataclass(frozen=True)
class Antibody(Task):
    """A variable domain of which ``share`` of the residues are holes; the grade is the share of holes filled as it was.

    A domain is a germline V gene, a random loop and a J gene, with ``mutations`` of the residues replaced. Training and
    test problems have other genes. A hole has many plausible fillings, so that nobody recovers all.
    """

    share: float = 0.9
    mutations: float = 0.05
    genes: str = "test"
    name: str = "antibody"

    def sample(self, rng: random.Random) -> Problem:
        gene = rng.choice(GENES[self.genes])
        heavy = gene.endswith(("CAR", "CAK"))
        loop = "".join(rng.choices("GYSDARTVLPWNEF", [6, 5, 5, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1], k=rng.randint(3, 9)))
        whole = gene + loop + rng.choice(JOINS["heavy" if heavy else "light"])
        whole = "".join(rng.choice(LETTERS) if rng.random() < self.mutations else letter for letter in whole)
        real = [5 + LETTERS.index(letter) for letter in whole]
        holes = set(rng.sample(range(len(real)), round(self.share * len(real))))
        ids = [CLS, *(MASK if i in holes else token for i, token in enumerate(real)), SEP]
        shown = "".join("_" if i in holes else letter for i, letter in enumerate(whole))
        return Problem(shown, whole, ids=ids)

    def grade(self, problem: Problem, completion: Sequence[int]) -> float:
        pairs = zip(problem.prompt, problem.answer, completion[1:-1], strict=True)
        right = [token == 5 + LETTERS.index(letter) for shown, letter, token in pairs if shown == "_"]
        return sum(right) / len(right)

    def training_problems(self, seed: int, first: int, count: int) -> list[Problem]:
        task = replace(self, genes="train")
        return super(Antibody, task).training_problems(seed, first, count)

    def held_out(self, key: str) -> Problem:
        return replace(self, genes="train").sample(random.Random(key))


def convert(source: str, folder: str) -> None:
    """Write AntiBERTy's masked language model, without its three classifiers, as a folder that ``load_model`` reads."""
    weights = Path(source, "AntiBERTy_md_smooth")
    Path(folder).mkdir(parents=True, exist_ok=True)
    stored = torch.load(weights / "pytorch_model.bin", map_location="cpu", weights_only=True)
    others = ("cls.species", "cls.chain", "cls.graft", "bert.pooler", "bert.embeddings.position_ids")
    kept = {name: tensor.clone() for name, tensor in stored.items() if not name.startswith(others)}
    save_file(kept, Path(folder, "model.safetensors"), {"format": "pt"})
    config = json.loads((weights / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "mask_token_id": MASK}
    Path(folder, "config.json").write_text(json.dumps(config, indent=1))


def train(model: str, output: str) -> None:
    """Train a set policy on the model's own careful decodes; no grade is read."""
    settings = {
        "output_dir": output, "model": model, "dtype": "bfloat16", "task": "antibody", "max_completion_length": 140,
        "block_length": "full", "labels": "agreement", "careful": "threshold:0.9", "careful_iterations": 8,
        "num_prompts": 16, "max_states": 256, "iterations": 40, "minibatch_size": 64, "num_iterations": 4,
    }  # fmt: skip
    SetTrainer(SetTrainerConfig.from_dict(settings), task=Antibody()).train()


RISKS = (0.03, 0.1, 0.3, 1, 4, 16)
RULES = [
    *(f"threshold:{x}" for x in (0.2, 0.3, 0.4, 0.5, 0.7, 0.9)),
    *(f"factor:{x}" for x in (2, 4, 8, 16)),
    *(f"entropy-bound:{x}" for x in (2, 4, 8, 16, 32, 64)),
]


def compare(model: str, policy: str, problems: str = "100", *risks: str) -> None:
    """Recovery and forwards of each rule and of the policy at each risk, on the same test problems.

    The policy is compared, problem by problem, with the best rule of at most a quarter of a forward more.
    """
    base, task = load_model(model, dtype="bfloat16"), Antibody()
    drawn = task.problems(int(problems), 0)
    longest = max(len(p.ids) for p in drawn)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + list(p.ids) for p in drawn])
    rules: list[tuple[float, torch.Tensor, str]] = []
    for name, risk in [*((rule, None) for rule in RULES), *((policy, float(risk)) for risk in risks or RISKS)]:
        config = SamplerConfig(block_length=None, alpha=risk, actions="greedy", max_batch_size=32)
        out = Sampler(base, None, name, config).infill(ids, ids != 0)
        texts = zip(drawn, out.sequences.tolist(), strict=True)
        grades = torch.tensor([task.grade(p, text[-len(p.ids) :]) for p, text in texts])
        nfe, said = out.steps.float().mean().item(), name if risk is None else f"policy, risk {risk:g}"
        line = f"{said:<18} {nfe:6.2f} forwards  recovery {grades.mean():.3f}"
        if risk is None:
            rules.append((nfe, grades, name))
        elif near := [rule for rule in rules if rule[0] <= nfe + 0.25]:
            _, others, best = max(near, key=lambda rule: rule[1].mean().item())
            gain = grades - others
            line += f"  {gain.mean():+.3f} ± {gain.std() / len(gain) ** 0.5:.3f} against {best}"
        print(line, flush=True)


if __name__ == "__main__":
    {"convert": convert, "train": train, "compare": compare}[sys.argv[1]](*sys.argv[2:])
