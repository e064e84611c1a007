"""Train a small masked diffusion model from scratch with LLaDA's objective.

Response tokens are masked with a ratio t, and the cross entropy on them is weighted 1 / t (Nie et al., "Large
Language Diffusion Models", eq. 3). Ratios are stratified over the batch, which reduces gradient noise.
"""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask.models.loading import load_model
from unmask.models.tokenizer import CharTokenizer
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.models.weights import save_model
from unmask.pretraining.config import Recipe
from unmask.pretraining.optimizer import Muon


def encode_batch(recipe: Recipe, tokenizer: CharTokenizer, step: int) -> tuple[Tensor, Tensor]:
    """Training sequences (batch, prompt + response) and their attention mask; a pure function of seed and step."""
    rng = random.Random(f"{recipe.seed}/{step}")
    task = recipe.task_at(step)
    rows, lengths = [], []
    for _ in range(recipe.batch_size):
        problem = task.sample(rng)
        prompt, response = tokenizer.encode(problem.prompt), tokenizer.encode(problem.response)
        pad, tail = recipe.prompt_length - len(prompt), recipe.response_length - len(response)
        if pad < 0 or tail < 0:
            raise ValueError(f"problem {problem} does not fit prompt_length or response_length of {recipe}")
        rows.append([tokenizer.pad_token_id] * pad + prompt + response + [tokenizer.eos_token_id] * tail)
        lengths.append(pad)
    tokens = torch.tensor(rows)
    attention = torch.arange(tokens.shape[1]) >= torch.tensor(lengths)[:, None]
    return tokens, attention


def diffusion_loss(
    model: Transformer, recipe: Recipe, tokens: Tensor, attention: Tensor, rng: torch.Generator
) -> Tensor:
    """Masked cross entropy weighted 1 / t, in nats per response token."""
    batch, response = tokens.shape[0], tokens[:, recipe.prompt_length :]
    low = recipe.min_mask_ratio
    strata = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
    ratio = (low + (1 - low) * strata)[:, None]
    masked = torch.rand(response.shape, generator=rng) < ratio
    noisy = torch.where(masked, torch.full_like(response, CharTokenizer.mask_token_id), response)
    canvas = torch.cat((tokens[:, : recipe.prompt_length], noisy), dim=1)
    logits = model(canvas, attention, positions=slice(recipe.prompt_length, None))
    losses = F.cross_entropy(logits.flatten(0, 1), response.flatten(), reduction="none").view_as(response)
    return (losses * masked / ratio).sum() / response.numel()


def build_model(recipe: Recipe, tokenizer: CharTokenizer) -> Transformer:
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
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # every layer starts as the identity
            nn.init.zeros_(p)
    model.generation_defaults = {"max_new_tokens": recipe.response_length, "block_length": recipe.block_length}
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
        self.tokenizer = CharTokenizer(recipe.characters)
        self.model = build_model(recipe, self.tokenizer)
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = (
            Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
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
        tokens, attention = encode_batch(self.recipe, self.tokenizer, self.step)
        rng = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        loss = diffusion_loss(self.model, self.recipe, tokens, attention, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        factor = self.learning_rate_factor()
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as flat named tensors."""
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in entry.items()}
        return tensors | {"step": torch.tensor(self.step)}

    def save_state(self) -> None:
        target = self.folder / "state.safetensors"
        partial = target.with_suffix(".partial")
        save_file(self.state(), partial, metadata=described(self.recipe))
        partial.replace(target)  # atomic: a killed run leaves the last whole state

    def load_state(self) -> bool:
        """Resume from the folder's state; False if there is none. Raises ValueError if it is of another recipe."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            made_by, mine = file.metadata() or {}, described(self.recipe)
        both = sorted(made_by.keys() & mine)
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


def pretrain(recipe: Recipe, folder: Path, save_every: int = 250, log_every: int = 50) -> Run:
    """Train ``recipe`` in ``folder``, resuming its state if there is one; prints a line per ``log_every`` steps."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, folder)
    if run.load_state():
        print(f"resuming {folder} at step {run.step}", flush=True)
    started, first, average = time.perf_counter(), run.step, None
    while run.step < recipe.steps:
        loss = run.train_step()
        average = loss if average is None else 0.98 * average + 0.02 * loss
        if run.step % log_every == 0:
            rate = (run.step - first) * recipe.batch_size / (time.perf_counter() - started)
            print(f"step {run.step}/{recipe.steps}  loss {average:.4f} nats/token  {rate:.0f} samples/s", flush=True)
        if run.step % save_every == 0 or run.step == recipe.steps:
            run.save_state()
    save_model(run.model, folder, run.tokenizer)
    return run
