"""Train a policy for someone else's masked language model, AntiBERTy, which fills holes in antibodies.

    pip download antiberty==0.1.3 --no-deps && unzip antiberty-0.1.3-py3-none-any.whl -d runs/wheel
    python examples/antibody.py convert runs/wheel/antiberty/trained_models runs/antiberty
    python examples/antibody.py train runs/antiberty runs/antibody            # 14 minutes on one busy core

Its test problems, in this folder so that the task is found, beside rules at several settings; then paired differences:

    unmask evaluate --task antibody:Antibody --model ../runs/antiberty --dtype bfloat16 --max-new-tokens 140 \
        --problems 100 --regimes full --output ../runs/antibody/rows.csv --alphas 0.03 0.1 0.3 1 4 16 \
        --policies ours=../runs/antibody/policy threshold:0.1 threshold:0.3 threshold:0.5 threshold:0.7 threshold:0.9 \
        factor:1 factor:2 factor:4 factor:8 factor:16 entropy-bound:1 entropy-bound:2 entropy-bound:4 \
        entropy-bound:8 entropy-bound:16 entropy-bound:32 entropy-bound:64
    unmask compare ../runs/antibody/rows.csv

AntiBERTy (Ruffolo, Gray and Sulam, arXiv 2112.07782; MIT) has 26 million parameters and predicts masked residues.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import BertForMaskedLM

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
    """Write AntiBERTy's masked language model, without its classifiers, as safetensors for ``load_model``."""
    model = BertForMaskedLM.from_pretrained(Path(source, "AntiBERTy_md_smooth"))
    model.config.mask_token_id = MASK
    model.save_pretrained(folder)


def train(model: str, output: str) -> None:
    """Train a set policy on the model's own careful decodes; no grade is read."""
    settings = {
        "output_dir": output, "model": model, "dtype": "bfloat16", "task": "antibody", "max_completion_length": 140,
        "block_length": "full", "labels": "agreement", "careful": "threshold:0.9", "careful_iterations": 8,
        "num_prompts": 16, "max_states": 256, "iterations": 40, "minibatch_size": 64, "num_iterations": 4,
    }  # fmt: skip
    SetTrainer(SetTrainerConfig.from_dict(settings), task=Antibody()).train()


if __name__ == "__main__":
    {"convert": convert, "train": train}[sys.argv[1]](*sys.argv[2:])
