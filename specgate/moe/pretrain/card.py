"""The model card of a reference MoE, written from the metrics of its training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LICENCES = {
    "code_go": "BSD-3-Clause",
    "code_python": "PSF-2.0",
    "code_rust": "MIT or Apache-2.0",
    "docs_python": "PSF-2.0",
    "law_english": "government edicts, public domain",
    "lit_english": "public domain",
    "lit_french": "public domain",
    "lit_german": "public domain",
    "lit_spanish": "public domain",
    "tech_proposals": "public domain, CC0",
    "wordnet_glosses": "WordNet licence",
}


def write_card(metrics: dict[str, Any], path: Path) -> None:
    """Writes the card as Markdown with a YAML header, as model hubs read it.

    Args:
        metrics: contents of the run's ``metrics.json``.
        path: the README.md to write.
    """
    config, corpus, training, found = (metrics[k] for k in ("config", "corpus", "training", "evaluation"))
    moe = config["moe"]
    name, optimiser = moe["name"], moe["optimiser"]
    total = sum(corpus["train_tokens"].values())
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [mixture-of-experts, specgate]",
        "---",
        f"# {name}",
        "",
        moe["description"].strip(),
        "",
        "It exists to give real, reproducible expert routing on machines without network or GPU. It is no",
        "assistant: it was trained for minutes, on text of the past or of programs, and its continuations",
        "mean nothing.",
        "",
        "## Recipe",
        f"`python -m specgate.moe.pretrain moe={name}`: {training['tokens']:,} tokens in "
        f"{training['steps']:,} steps of about {config['tokens_per_step']:,} on one {training['device']}, "
        f"{config['precision']}; AdamW, learning rate {optimiser['lr']}, cosine decay; balance loss "
        f"{optimiser['balance']} and z-loss {optimiser['z']} on each layer; "
        f"seed {config['seed']}; {training['parameters']:,} parameters, saved in bfloat16.",
        "",
        "```yaml",
        *(f"{k}: {v}" for k, v in moe["architecture"].items()),
        f"vocab_size: {corpus['vocab_size']}",
        "```",
        "",
        "## Data",
        f"{total:,} distinct training tokens (byte-level BPE learned on the same text). "
        f"{corpus['left_out_as_copies']} of {corpus['documents']} documents were left out because they also "
        "stand in the text that is traced later.",
        "",
        "| domain | licence | training tokens |",
        "|---|---|---|",
        *(
            f"| {d} | {LICENCES.get(d, 'see its source')} | {n:,} |"
            for d, n in corpus["train_tokens"].items()
        ),
        "",
        "## Held-out loss (nats per token)",
    ]
    baselines = [b for b in ("unigram", "4-gram") if b in next(iter(found["loss"].values()))]
    lines += ["| domain | tokens scored | model | " + "".join(f"{b} | " for b in baselines)]
    lines += ["|---|---|---|" + "---|" * len(baselines)]
    for domain, row in found["loss"].items():
        cells = "".join(f"{row[b]:.3f} | " for b in baselines)
        lines.append(f"| {domain} | {row['tokens']:,} | {row['model']:.3f} | {cells}")
    lines += [
        "",
        "The 4-gram model is interpolated with absolute discounting and counted on all training tokens.",
        "",
        "## Expert load on held-out text",
        "Entropy of the load of each layer over its maximum (1 is perfectly balanced), and the share of",
        "choices that always naming the most popular experts foresees.",
        "",
        "| MoE layer | load entropy | popularity recall@K |",
        "|---|---|---|",
        *(
            f"| {i} | {e:.3f} | {r:.3f} |"
            for i, (e, r) in enumerate(zip(found["load_entropy"], found["popularity_recall"], strict=True))
        ),
        "",
        f"Popularity foresees {found['popularity_over_chance']:.2f} times what chance would."
        + (" Layers of the encoder come first." if moe["family"] == "switch" else ""),
        "",
    ]
    path.write_text("\n".join(lines))
