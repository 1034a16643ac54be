#!/usr/bin/env python3
"""Train the testbed language model that ships in ``prism_gguf/testbed/model``.

The text is documentation carried by Debian packages (listed in ``SOURCES`` with their licences). Whole pages of
the two permissively licensed sources are held out before anything else happens, and every training paragraph that
also occurs in a held-out page is dropped, so the model never reads what it is evaluated on.

    pip install -e . beautifulsoup4 html2text -c constraints.txt
    python scripts/train_testbed.py --out prism_gguf/testbed

Needs Debian's apt-get and dpkg-deb to fetch and unpack the packages (or ``--debs DIR`` with the .deb files in it).
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import html2text
import numpy as np
import torch
from bs4 import BeautifulSoup
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|bos|>"
CONTEXT = 512


@dataclass(frozen=True)
class Source:
    """One Debian package, the pages in it that count, and how many bytes of whole pages are held out."""

    package: str
    pattern: str
    licence: str
    held_out_name: str | None = None
    held_out_bytes: int = 0


SOURCES = [
    Source("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", "PostgreSQL", "postgresql", 150_000),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.txt", "PSF-2.0", "python", 150_000),
    Source("git-doc", "usr/share/doc/git-doc/**/*.txt", "GPL-2.0"),
    Source("debian-policy", "usr/share/doc/debian-policy/policy.html/*.html", "GPL-2.0-or-later"),
    Source("developers-reference", "usr/share/developers-reference/*.html", "GPL-2.0-or-later"),
    Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "GPL-2.0-or-later OR CC-BY-SA-3.0"),
]


def fetch(debs: Path) -> None:
    """Download the packages that are missing from ``debs`` with apt-get."""
    debs.mkdir(parents=True, exist_ok=True)
    missing = [s.package for s in SOURCES if not list(debs.glob(f"{s.package}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)


def page_text(path: Path) -> str:
    raw = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":
        page = BeautifulSoup(raw, "html.parser")
        for navigation in page.find_all(class_=["navheader", "navfooter"]):
            navigation.decompose()
        raw = str(page)
        reader = html2text.HTML2Text(bodywidth=0)
        reader.ignore_links = reader.ignore_images = reader.ignore_emphasis = True
        raw = reader.handle(raw)
    return "\n".join(line.rstrip() for line in raw.splitlines()).strip() + "\n"


def paragraphs(text: str) -> Iterator[str]:
    return (p for p in text.split("\n\n") if p.strip())


def collect(debs: Path, work: Path) -> tuple[list[str], dict[str, str]]:
    """Training pages, and held-out text by domain name."""
    training: list[str] = []
    held_out: dict[str, str] = {}
    for source in SOURCES:
        (deb,) = debs.glob(f"{source.package}_*.deb")
        root = work / source.package
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        files = sorted(p for p in root.glob(source.pattern) if p.is_file())
        # A fixed pseudo-random order by name, so that the held-out pages do not depend on the file system.
        files.sort(key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest())
        kept: list[str] = []
        for path in files:
            text = page_text(path)
            size = sum(map(len, kept))
            if source.held_out_name and size < source.held_out_bytes and 2_000 < len(text) < 40_000:
                kept.append(text)
            else:
                training.append(text)
        if source.held_out_name:
            held_out[source.held_out_name] = "\n".join(kept)
        click.echo(f"{source.package}: {len(files)} pages, {len(kept)} of them held out")
    seen = {p.strip() for text in held_out.values() for p in paragraphs(text) if len(p.strip()) >= 40}
    training = ["\n\n".join(p for p in paragraphs(t) if p.strip() not in seen) + "\n" for t in training]
    return training, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer, which llama.cpp implements as ``gpt-2``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    bos = tokenizer.bos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([i for row in rows for i in (bos, *row)], dtype=np.int64)


def make_model(vocab_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Mean loss in nats per token over consecutive windows of ``CONTEXT`` tokens."""
    n = len(tokens) // CONTEXT
    windows = torch.from_numpy(tokens[: n * CONTEXT]).view(n, CONTEXT)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double().item() for w in windows]
    model.train()
    return sum(losses) / len(losses)


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def train(
    model: LlamaForCausalLM, tokens: np.ndarray, held_out: np.ndarray, steps: int, batch: int, lr: float, report: Path
) -> None:
    data = torch.from_numpy(tokens)
    generator = torch.Generator().manual_seed(1)
    opts = optimizers(model, lr)
    warmup = min(100, steps // 10)
    start = time.monotonic()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * decay)
        at = torch.randint(len(data) - CONTEXT, (batch,), generator=generator)
        ids = torch.stack([data[i : i + CONTEXT] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == steps - 1:
            rate = (step + 1) * batch * CONTEXT / (time.monotonic() - start)
            line = f"step {step + 1}/{steps} loss {loss.item():.3f} {rate:.0f} tokens/s"
            if step % 500 == 499 or step == steps - 1:
                line += f" held-out {held_out_loss(model, held_out[: 64 * CONTEXT]):.3f}"
            click.echo(line)
            with report.open("a") as f:
                f.write(line + "\n")


CARD = """---
license: mit
language: en
---
# prism-gguf testbed

A small Llama that is really trained, for measuring what quantization breaks without downloading anything: hidden 256,
4 layers, 4 heads (2 for keys and values), feed-forward 768, vocabulary 4096 (byte-level BPE), untied head, {parameters:,}
parameters, fp16. All row widths are multiples of 256, so every K-quant applies.

- Trained on {training_tokens_seen:,} tokens ({epochs:.1f} passes over {training_tokens_in_corpus:,}) in windows of
  {context}, {steps:,} steps, {minutes:.0f} minutes on 2 CPU cores shared with other work, torch {torch}.
- Held-out perplexity **{held_out_perplexity:.2f}** ({held_out_loss_nats:.3f} nats per token) on {held_out_tokens:,} tokens,
  windows of {context} scored from their first token on.
- Made by `scripts/train_testbed.py`. The held-out pages, in `../text`, were set aside whole before training, and every
  training paragraph that also occurs in them was dropped.
- It knows the register of software documentation and nothing else. It is a measuring instrument, not an assistant.

## Text

| Debian package | licence of the text | used for |
|---|---|---|
{rows}

The PostgreSQL documentation is © The PostgreSQL Global Development Group, under the PostgreSQL License; the Python
documentation is © Python Software Foundation, under the PSF License Version 2. Only these two are shipped, as held-out
text; `../text/LICENSES.md` has the terms.
"""


def write_card(model_dir: Path, figures: dict) -> None:
    """The model card, with the figures of this very training."""
    rows = "\n".join(
        f"| {s.package} | {s.licence} | training{' and held-out' if s.held_out_name else ''} |" for s in SOURCES
    )
    epochs = figures["training_tokens_seen"] / figures["training_tokens_in_corpus"]
    (model_dir / "README.md").write_text(CARD.format(rows=rows, epochs=epochs, context=CONTEXT, **figures))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("prism_gguf/testbed"), show_default=True)
@click.option("--debs", type=click.Path(path_type=Path), default=Path("/tmp/prism-testbed/debs"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/prism-testbed/work"), show_default=True)
@click.option("--steps", default=6000, show_default=True)
@click.option("--batch", default=8, show_default=True, help=f"Sequences of {CONTEXT} tokens a step.")
@click.option("--lr", default=4e-3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(out: Path, debs: Path, work: Path, steps: int, batch: int, lr: float, threads: int) -> None:
    """Make the testbed: tokenizer, weights (fp16 safetensors), held-out text and training figures."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    fetch(debs)
    training, held_out = collect(debs, work)
    tokenizer = train_tokenizer(training, vocab_size=4096)
    tokens = encode(tokenizer, training)
    held_tokens = encode(tokenizer, list(held_out.values()))
    click.echo(
        f"{sum(map(len, training)):,} characters, {len(tokens):,} training tokens, {len(held_tokens):,} held out"
    )
    model = make_model(len(tokenizer))
    click.echo(f"{model.num_parameters():,} parameters")
    started = time.time()
    train(model, tokens, held_tokens, steps, batch, lr, work / "train.log")
    model = model.to(torch.float16)
    model_dir = out / "model"
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    for name, text in held_out.items():
        (out / "text").mkdir(parents=True, exist_ok=True)
        (out / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    loss = held_out_loss(model.float(), held_tokens)
    figures = {
        "parameters": model.num_parameters(),
        "training_tokens_in_corpus": len(tokens),
        "training_tokens_seen": steps * batch * CONTEXT,
        "steps": steps,
        "minutes": round((time.time() - started) / 60, 1),
        "held_out_tokens": len(held_tokens),
        "held_out_loss_nats": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(model_dir, figures)
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
