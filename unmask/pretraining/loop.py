"""Train a small masked diffusion model from scratch with LLaDA's objective.

Response tokens are masked with a ratio t, and the cross entropy on them is weighted 1 / t (Nie et al., "Large
Language Diffusion Models", eq. 3). Ratios are stratified over the batch, which reduces gradient noise. Of a
block-causal model one block of each response is masked, drawn evenly and weighted by their number. Ratios alone never
show a model what decoding from left to right does, a text whose end is open: a recipe can ask for a share of those.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unmask.files import write_atomically
from unmask.models.base import real_positions
from unmask.models.loading import load_model
from unmask.models.tokenizer import CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.models.weights import save_model
from unmask.pretraining.config import Blend, Recipe
from unmask.pretraining.optimizer import Muon, matrices_and_rest


def make_tokenizer(recipe: Recipe, folder: Path) -> CharTokenizer | WordTokenizer:
    """The tokenizer of the recipe's characters, or of the task's words; words that ``folder`` has noted are kept."""
    if recipe.characters is not None:
        return CharTokenizer(recipe.characters)
    if not isinstance(recipe.task, Blend):
        raise ValueError(f"the recipe needs characters: the task {recipe.task.name!r} is not made of words")
    return WordTokenizer.of_folder(folder) or WordTokenizer.of_texts(recipe.task.texts())


@dataclasses.dataclass
class Group:
    """Training sequences that go through the model together: a left-padded prompt, then the buffer."""

    tokens: Tensor
    """(rows, prompt + buffer) int64."""
    attention: Tensor
    """(rows, prompt + buffer) bool, False on padding."""
    buffer: int


def encode_batch(recipe: Recipe, tokenizer: CharTokenizer | WordTokenizer, step: int) -> list[Group]:
    """The training sequences of ``step`` in groups of alike length; a pure function of the recipe's seed and step."""
    rng = random.Random(f"{recipe.seed}/{step}")
    task = recipe.task_at(step)
    rows: dict[int, list[tuple[list[int], list[int]]]] = {}
    for _ in range(recipe.batch_size):
        problem = task.sample(rng)
        prompt, response = tokenizer.encode(problem.prompt), tokenizer.encode(problem.response)
        weights = dict(zip(recipe.buffers, recipe.buffer_weights, strict=True))
        fitting = [buffer for buffer in recipe.buffers if buffer >= len(response)]
        if not fitting:
            raise ValueError(f"the response of {problem} has {len(response)} tokens, buffers={recipe.buffers}")
        [buffer] = rng.choices(fitting, [weights[buffer] for buffer in fitting])
        filled = response + [tokenizer.eos_token_id] * (buffer - len(response))
        rows.setdefault(buffer, []).append((prompt, filled))
    groups = []
    for buffer in sorted(rows):
        ordered = sorted(rows[buffer], key=lambda row: len(row[0]))
        for first in range(0, len(ordered), recipe.group_rows):
            some = ordered[first : first + recipe.group_rows]
            longest = len(some[-1][0])
            tokens = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p + r for p, r in some])
            padding = torch.tensor([longest - len(p) for p, _ in some])
            groups.append(Group(tokens, torch.arange(tokens.shape[1]) >= padding[:, None], buffer))
    return groups


def diffusion_loss(model: Transformer, recipe: Recipe, group: Group, rng: torch.Generator) -> Tensor:
    """Masked cross entropy weighted 1 / t, in nats, summed over the group's response tokens."""
    tokens, buffer = group.tokens, group.buffer
    low, rows = recipe.min_mask_ratio, tokens.shape[0]
    strata = (torch.randperm(rows, generator=rng) + torch.rand(rows, generator=rng)) / rows
    ratio = (low + (1 - low) * strata)[:, None].expand(rows, buffer)
    masked = torch.zeros_like(group.attention)
    masked[:, -buffer:] = torch.rand((rows, buffer), generator=rng) < ratio
    weight = 1 / ratio
    if recipe.attention == "block-causal":
        blocks = real_positions(group.attention)[:, -buffer:] // (recipe.block_length or 1)
        first, count = blocks[:, :1], blocks[:, -1:] - blocks[:, :1] + 1
        masked[:, -buffer:] &= blocks == first + (torch.rand((rows, 1), generator=rng) * count).long()
        weight = weight * count
    if recipe.open_share:
        masked[:, -buffer:], weight = open_ends(tokens[:, -buffer:], model, recipe, masked[:, -buffer:], weight, rng)
    canvas = tokens.masked_fill(masked, model.mask_token_id)
    # On a CPU the plain attention is faster to differentiate than the fused one, at these lengths.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        logits = model(canvas, group.attention, positions=masked.flatten().nonzero()[:, 0])
    losses = F.cross_entropy(logits.float(), tokens[masked], reduction="none")
    return (losses * weight[masked[:, -buffer:]]).sum()


def open_ends(
    response: Tensor, model: Transformer, recipe: Recipe, masked: Tensor, weight: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``masked`` and ``weight`` (rows, buffer), changed in a share of the rows to those of a text with an open end.

    Everything from a random place in the text on is masked, with weight 1. In half of these rows all before another
    random place is shown.
    """
    share, end, cut = torch.rand((3, len(response), 1), generator=rng)
    text = response.ne(model.eos_token_id or 0).sum(dim=1, keepdim=True)
    end = (end * (text + 1)).long()
    cut = ((2 * cut - 1) * (end + 1)).long()
    place, chosen = torch.arange(response.shape[1]), share < recipe.open_share
    hidden = place >= end
    masked = torch.where(chosen, hidden | (masked & (place >= cut)), masked)
    return masked, torch.where(chosen & hidden, 1.0, weight)


def build_model(recipe: Recipe, tokenizer: CharTokenizer | WordTokenizer) -> Transformer:
    """A freshly initialised model of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    model = Transformer(
        TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=recipe.hidden_size,
            num_layers=recipe.num_layers,
            num_heads=recipe.num_heads,
            intermediate_size=recipe.intermediate_size,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=256,
            rope_theta=10_000.0,
            attention=recipe.attention,
            block_length=recipe.block_length if recipe.attention == "block-causal" else None,
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # every layer starts as the identity
            nn.init.zeros_(p)
    model.generation_defaults = {"max_new_tokens": recipe.buffers[0], "block_length": recipe.block_length}
    if recipe.start is not None:
        own = model.state_dict()
        known = load_model(recipe.start).state_dict()
        fitting = {name: v for name, v in known.items() if name in own and v.shape == own[name].shape}
        if not fitting:
            raise ValueError(f"start={recipe.start!r}: none of its tensors has a name and shape of the recipe's model")
        model.load_state_dict({**own, **fitting})
    return model


class Run:
    """A resumable pretraining run in ``folder``: ``state.safetensors`` holds weights, optimizers and the step."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.tokenizer = make_tokenizer(recipe, folder)
        self.model = build_model(recipe, self.tokenizer)
        matrices, rest = matrices_and_rest(self.model.layers, self.model)
        self.optimizers = (
            Muon(
                matrices,
                lr=recipe.muon_lr,
                weight_decay=recipe.weight_decay,
                dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            ),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self.step = 0

    def learning_rate_factor(self) -> float:
        """Linear warm-up, a plateau, then linear decay to 0 over the last ``decay_share`` of the steps."""
        r = self.recipe
        decay_steps = max(1, round(r.steps * r.decay_share))
        return min(1.0, (self.step + 1) / r.warmup, (r.steps - self.step) / decay_steps)

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats per response token."""
        groups = encode_batch(self.recipe, self.tokenizer, self.step)
        rng = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        count = sum(group.tokens.shape[0] * group.buffer for group in groups)
        total = 0.0
        for group in groups:
            loss = diffusion_loss(self.model, self.recipe, group, rng) / count
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        factor = self.learning_rate_factor()
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for settings in optimizer.param_groups:
                settings["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as flat named tensors."""
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in entry.items()}
        return tensors | {"step": torch.tensor(self.step)}

    def save_state(self) -> None:
        target = self.folder / "state.safetensors"
        write_atomically(target, lambda path: save_file(self.state(), path, metadata=described(self.recipe)))
        self.tokenizer.save_pretrained(self.folder)

    def load_state(self) -> bool:
        """Resume from the folder's state; False if there is none. Raises ValueError if it is of another recipe."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            made_by, mine = file.metadata() or {}, described(self.recipe)
        both = sorted((made_by.keys() & mine) - {"steps"})  # a run may be made longer
        if differing := [f"{k} {made_by[k]} there, {mine[k]} here" for k in both if made_by[k] != mine[k]]:
            raise ValueError(f"{path} is of a run with another recipe: {'; '.join(differing)}")
        tensors = load_file(path)
        self.step = int(tensors.pop("step"))
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for i, optimizer in enumerate(self.optimizers):
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{i}."):
                    _, _, j, name = key.split(".", 3)
                    entries.setdefault(int(j), {})[name] = value
            optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        return True


def described(recipe: Recipe) -> dict[str, str]:
    """A recipe's fields as text."""
    return {f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def write_curve(path: Path, rows: list[dict[str, float]]) -> None:
    """Replace the file of the curve in one step."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write_text(text))


def pretrain(recipe: Recipe, folder: Path, save_every: int = 250, log_every: int = 50) -> Run:
    """Train ``recipe`` to its end in ``folder``, resuming what is there.

    Every ``log_every`` steps a line is printed and appended to ``curve.jsonl``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, folder)
    if run.load_state():
        print(f"resuming {folder} at step {run.step}", flush=True)
    curve = folder / "curve.jsonl"
    rows = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
    rows = [row for row in rows if row["step"] <= run.step]  # those behind the saved state come again
    started, first, losses = time.perf_counter(), run.step, []
    while run.step < recipe.steps:
        losses.append(run.train_step())
        if run.step % log_every == 0 or run.step == recipe.steps:
            rate = (run.step - first) * recipe.batch_size / (time.perf_counter() - started)
            row = {"step": run.step, "loss": sum(losses) / len(losses), "samples_per_second": round(rate, 1)}
            print(
                f"step {run.step}/{recipe.steps}  loss {row['loss']:.4f} nats/token  {rate:.0f} samples/s", flush=True
            )
            rows.append(row)
            write_curve(curve, rows)
            losses = []
        if run.step % save_every == 0 or run.step == recipe.steps:
            run.save_state()
    save_model(run.model, folder, run.tokenizer)
    return run
