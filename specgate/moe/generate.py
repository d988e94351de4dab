"""More text to trace, written by the host itself: ``python -m specgate.moe.generate olmoe_ref --out
more.txt.xz``.

Letters: B documents in a batch, P prompt tokens, G generated tokens.

A predictor learns from states that its host goes through; the host can make as many of them as one likes.
Each document goes on from the first tokens of a training document of the bundled text, sampled at temperature
1 (as data-free quantisation does: Liu et al., "LLM-QAT", 2023, arXiv:2305.17888). Trace the file with
``text=files text.split=train``: what a model wrote must never be what a predictor is scored on.
"""

from __future__ import annotations

import argparse
import lzma
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from specgate.errors import ConfigError, SpecgateError
from specgate.moe.hosts import Host, load_host
from specgate.moe.text import SEPARATOR, TextDocument, bundled_documents


def prompts_BP(host: Host, documents: Sequence[TextDocument], count: int, length: int, seed: int) -> Tensor:
    """The first ``length`` tokens at random places of training documents: ``[B, P]`` int64.

    Raises:
        ConfigError: if no training document is that long.
    """
    texts = [d.text for d in documents if d.split == "train"]
    ids = host.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    long = [np.asarray(one) for one in ids if len(one) >= length]
    if not long:
        raise ConfigError(f"no training document has {length} tokens: give a smaller --prompt-length")
    rng = np.random.default_rng(seed)
    room = np.array([len(one) - length + 1 for one in long])
    chosen = rng.choice(len(long), count, p=room / room.sum())
    return torch.from_numpy(
        np.stack([long[i][(at := int(rng.integers(room[i]))) : at + length] for i in chosen]).astype(np.int64)
    )


@torch.no_grad()
def write_documents(
    host: Host, prompts: Tensor, tokens: int, temperature: float, batch_size: int, seed: int
) -> list[str]:
    """One text per prompt: prompt and what the host wrote after it, up to its end-of-text token.

    Raises:
        ConfigError: for an encoder-decoder, which does not go on from a prompt.
    """
    if len(host.family.stacks) > 1:
        raise ConfigError(
            f"{host.model_id} is an encoder-decoder: name a decoder-only model, such as olmoe_ref"
        )
    torch.manual_seed(seed)
    model: Any = host.model
    texts: list[str] = []
    for part in track(
        prompts.split(batch_size), description="writing", transient=True, disable=not sys.stdout.isatty()
    ):
        out = model.generate(
            input_ids=part.to(host.device),
            attention_mask=torch.ones_like(part).to(host.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=host.tokenizer.pad_token_id or 0,
        )
        texts += host.tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def save(texts: Sequence[str], path: Path) -> None:
    """Write the documents, visible only when whole; ``.xz`` is packed."""
    body = SEPARATOR.join(text.replace("\f", " ") for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(lzma.compress(body, preset=1) if path.suffix == ".xz" else body)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m specgate.moe.generate", description="Let a model write text to trace it on."
    )
    parser.add_argument("model", help="a bundled model, a directory or a name on the hub")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .txt or .txt.xz")
    parser.add_argument("--documents", type=int, default=10000)
    parser.add_argument("--tokens", type=int, default=128, help="written after the prompt")
    parser.add_argument(
        "--prompt-length", type=int, default=8, help="tokens of a training document to start from"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    try:
        for name in ("documents", "tokens", "prompt_length", "batch_size"):
            if getattr(args, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(args, name)} is too small: at least 1"
                )
        if args.temperature <= 0:
            raise ConfigError(
                f"--temperature {args.temperature} is not positive: 1 samples as the model says"
            )
        host = load_host(args.model, device=args.device)
        prompts = prompts_BP(host, bundled_documents(), args.documents, args.prompt_length, args.seed)
        save(
            write_documents(host, prompts, args.tokens, args.temperature, args.batch_size, args.seed),
            args.out,
        )
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
