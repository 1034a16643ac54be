#!/usr/bin/env python3
"""Does PRISM's shape term mend a quantized model as a training penalty (``prism_gguf.ShapeRegularizer``)?

    python scripts/shape_regularizer.py [--json FILE]        # about six minutes on two cores

The testbed's body is put on ggml's 3-bit grid and frozen; an adapter of low rank beside each of its linear layers is
trained on the packaged text, with and without the penalty, and measured on the testbed's held-out text. Weights only:
llama.cpp's kernels are not in these numbers. All arms of a seed start from the same adapter and see the same windows.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from prism_gguf import ShapeRegularizer
from prism_gguf.formats.mix import ggml_type
from prism_gguf.formats.text.windows import Score, TokenWindows, default_texts, make_windows
from prism_gguf.measure.metrics.divergence import token_divergence
from prism_gguf.measure.metrics.geometry import SquareAccumulator, identity_geometry
from prism_gguf.models import ggml
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.output_head import HeadPair
from prism_gguf.system.environment import environment
from prism_gguf.testbed import MODEL, held_out_texts

PENALTY = ShapeRegularizer()
# The packaged domains that the testbed can read: German costs it 6.9 nats a token, Chinese 14, more than guessing (8.3).
DOMAINS = ("technical", "code", "dialogue")
CONTEXT = 256


class LowRankLinear(nn.Module):
    """A frozen linear layer and its adapter: W x + B A x, B zero at first, as in LoRA."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.down = nn.Parameter(torch.zeros(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """An adapter that changes nothing yet."""
        self.down.normal_(std=self.down.shape[1] ** -0.5, generator=generator)
        self.up.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


@dataclass(frozen=True)
class Arm:
    """What is minimised: a task's loss (``cross-entropy``, ``distillation`` or none) + weight · (1 − Ω)."""

    task: str | None
    weight: float

    @property
    def name(self) -> str:
        if self.task is None:
            return "penalty alone" if self.weight else "untrained"
        return self.task + (f" + {self.weight:g} (1 − Ω)" if self.weight else "")


@dataclass(frozen=True)
class Quality:
    """On the held-out text, beside the unquantized reference; nats per token, and the geometry's own units."""

    kld: float
    gap: float
    scale: float
    shape: float  # 1 − Ω


def quantized_body(kind: str, rank: int) -> HuggingFaceModel:
    """The testbed with its blocks' linear layers quantized and dequantized by ggml, adapters beside them."""
    model = HuggingFaceModel(MODEL)
    value = ggml_type(kind).value
    model.network.model.float()
    for block in model.network.model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    rows = ggml.dequantize(ggml.quantize_rows(linear.weight.numpy(), value), value)
                    setattr(parent, name, LowRankLinear(torch.from_numpy(rows), rank))
    return model


def final_states(model: HuggingFaceModel, windows: TokenWindows) -> np.ndarray:
    """States (n_scored, d) float32 of the scored tokens, as they enter the head."""
    parts = (s.hidden for tokens in windows.tokens for s in model.window_states(tokens, windows.first_scored))
    return np.concatenate(list(parts))


class Judge:
    """The reference on the held-out text."""

    def __init__(self, reference: HuggingFaceModel, windows: TokenWindows) -> None:
        self._windows, self._head, self.targets = windows, reference.output_head(), windows.targets
        self._states = final_states(reference, windows)

    def __call__(self, model: HuggingFaceModel) -> Quality:
        states = final_states(model, self._windows)
        gathered = SquareAccumulator()
        gathered.add(self._states, states)
        g = identity_geometry(gathered.squares())
        omega_missing = g.shape / (2 * g.rho_reference * g.rho_candidate)
        z_t, z_p, head = torch.from_numpy(self._states), torch.from_numpy(states), self._head
        tokens = token_divergence(HeadPair(head, head, head.n_rows).logits(z_t, z_p), self.targets)
        gap = float((tokens.nll_candidate - tokens.nll_reference).mean())
        return Quality(float(tokens.kld.mean()), abs(gap), g.scale, omega_missing)


def task_loss(
    task: str | None, head: torch.Tensor, candidate: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Nats per token of the candidate's states: against the text, or KLD(reference ‖ candidate).

    Args:
        head: the rows (V, d) that both sides share.
        candidate, reference: final states, (windows, n, d) float32.
        ids: what they read, (windows, n) int64.
    """
    if task == "cross-entropy":
        return F.cross_entropy(F.linear(candidate[:, :-1], head).flatten(0, 1), ids[:, 1:].flatten())
    if task == "distillation":
        target, made = (F.linear(states, head).log_softmax(-1).flatten(0, 1) for states in (reference, candidate))
        return F.kl_div(made, target, log_target=True, reduction="batchmean")
    return torch.zeros(())


def train(
    model: HuggingFaceModel,
    arm: Arm,
    tokens: torch.Tensor,
    reference_states: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Train new adapters of ``model``: AdamW, the rate warmed up and lowered along a cosine.

    Args:
        tokens: windows to train on, (windows, n) int64.
        reference_states: the reference's final states of all their tokens, (windows, n, d) float32.
        batch: windows a step.
    """
    network = model.network.model
    for layer in network.modules():
        if isinstance(layer, LowRankLinear):
            layer.reset(generator)
    adapters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    order = torch.cat(
        [torch.randperm(len(tokens), generator=generator) for _ in range(-(-steps * batch // len(tokens)))]
    )
    for chosen in order[: steps * batch].view(steps, batch):
        ids, reference = tokens[chosen], reference_states[chosen]
        candidate = network.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = task_loss(arm.task, network.lm_head.weight, candidate, reference, ids)
        if arm.weight:
            loss = loss + arm.weight * PENALTY(candidate, reference)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        scheduler.step()


def training_data(reference: HuggingFaceModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (windows, n) int64 of the packaged text, and the reference's final states of all their tokens."""
    texts = [text for text in default_texts() if text.domain in DOMAINS]
    # One token more than is trained on: a window's last one has no state.
    windows = make_windows(texts, reference.vocabulary, n_ctx=CONTEXT + 1, max_windows=None, score=Score.ALL)
    states = torch.from_numpy(final_states(reference, windows))
    return torch.from_numpy(windows.tokens[:, :-1].astype(np.int64)), states.view(windows.n_windows, CONTEXT, -1)


def arms(weights: tuple[float, ...]) -> list[Arm]:
    tasks = [Arm(task, weight) for task in ("cross-entropy", "distillation") for weight in (0.0, *weights)]
    return [*tasks, Arm(None, 1.0)]  # alone its weight does not matter: Adam takes it out again


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.3g}" + (f" ±{statistics.stdev(values):.1g}" if len(values) > 1 else "")


def report(found: dict[Arm, list[Quality]], settings: dict[str, Any], json_file: Path | None) -> None:
    """Print a table and what it was made with; write every run to ``json_file``."""
    table = Table("trained on", "KLD", "against λ = 0", "|ΔR|", "scale", "1 − Ω")
    for arm, seeds in found.items():
        plain = found.get(Arm(arm.task, 0.0)) if arm.task and arm.weight else None
        paired = "" if plain is None else spread([a.kld - b.kld for a, b in zip(seeds, plain, strict=True)])
        columns = [spread([getattr(q, name) for q in seeds]) for name in ("kld", "gap", "scale", "shape")]
        table.add_row(arm.name, columns[0], paired, *columns[1:])
    Console(width=140).print(table)
    for line in (settings, environment()):
        click.echo(", ".join(f"{name} {value}" for name, value in line.items()))
    if json_file is not None:
        rows = [{**asdict(arm), "name": arm.name, "runs": [asdict(q) for q in runs]} for arm, runs in found.items()]
        made = {"command": sys.argv, "settings": settings, "environment": environment(), "arms": rows}
        json_file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--type", "kind", default="Q3_K", show_default=True, help="ggml type of the body's linear layers.")
@click.option("--rank", default=8, show_default=True, help="Rank of each adapter.")
@click.option("--weight", "weights", multiple=True, type=float, default=(10.0, 100.0), show_default=True, help="λ.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each arm.")
@click.option("--steps", default=40, show_default=True, help="Steps of training.")
@click.option("--batch", default=4, show_default=True, help=f"Windows of {CONTEXT} tokens a step.")
@click.option("--rate", default=4e-3, show_default=True, help="AdamW's largest learning rate.")
@click.option("--windows", default=16, show_default=True, help="Held-out windows of 512 tokens, half of each scored.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run here.")
def main(
    kind: str,
    rank: int,
    weights: tuple[float, ...],
    seeds: int,
    steps: int,
    batch: int,
    rate: float,
    windows: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Train adapters on a 3-bit testbed with and without the shape penalty; a table of what the held-out text says."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    reference = HuggingFaceModel(MODEL)
    judge = Judge(reference, make_windows(held_out_texts(), reference.vocabulary, n_ctx=512, max_windows=windows))
    tokens, states = training_data(reference)
    model = quantized_body(kind, rank)
    found: dict[Arm, list[Quality]] = {Arm(None, 0.0): [judge(model)]}
    for seed in range(seeds):
        for arm in arms(weights):
            generator = torch.Generator().manual_seed(seed)
            train(model, arm, tokens, states, steps=steps, batch=batch, rate=rate, generator=generator)
            found.setdefault(arm, []).append(judge(model))
            click.echo(
                f"{time.monotonic() - started:4.0f} s  seed {seed}  {arm.name}: KLD {found[arm][-1].kld:.4f}", err=True
            )
    settings = {
        "type": kind,
        "rank": rank,
        "seeds": seeds,
        "steps": steps,
        "tokens a step": batch * CONTEXT,
        "tokens to train on": tokens.numel(),
        "tokens held out": len(judge.targets),
        "rate": rate,
        "seconds": round(time.monotonic() - started),
    }
    report(found, settings, json_file)


if __name__ == "__main__":
    main()
