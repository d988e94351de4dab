"""The bundled reference MoEs are what their cards say: small, loadable, balanced, better than word counts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from specgate.moe.text import BUNDLED_TEXT

REFERENCE = BUNDLED_TEXT.parent
HOSTS = ("switch_ref", "olmoe_ref")


@pytest.mark.parametrize("name", HOSTS)
def test_size_and_files(name: str) -> None:
    files = {p.name: p.stat().st_size for p in (REFERENCE / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json"} <= set(files)
    assert sum(files.values()) <= 14_000_000


def test_text_fits_the_package() -> None:
    assert sum(p.stat().st_size for p in BUNDLED_TEXT.iterdir()) < 3_000_000


@pytest.mark.parametrize("name", HOSTS)
def test_card_holds_what_was_asked_for(name: str) -> None:
    metrics = json.loads((REFERENCE / name / "metrics.json").read_text())
    found = metrics["evaluation"]
    assert metrics["training"]["tokens"] >= 120_000_000
    assert min(found["load_entropy"]) >= 0.95
    assert found["popularity_over_chance"] < 1.6
    assert all(row["model"] < row["unigram"] for row in found["loss"].values())
    assert metrics["corpus"]["left_out_as_copies"] > 0


def test_shapes() -> None:
    switch = AutoModelForSeq2SeqLM.from_pretrained(REFERENCE / "switch_ref")
    sparse = [n for n, m in switch.named_modules() if type(m).__name__ == "SwitchTransformersExperts"]
    assert sum(n.startswith("encoder") for n in sparse) >= 6
    assert sum(n.startswith("decoder") for n in sparse) >= 6
    assert switch.config.num_experts == 8
    olmoe = AutoModelForCausalLM.from_pretrained(REFERENCE / "olmoe_ref")
    assert (olmoe.config.num_experts, olmoe.config.num_experts_per_tok) == (32, 4)
    assert olmoe.config.num_hidden_layers >= 8
    assert {p.dtype for p in olmoe.parameters()} == {torch.bfloat16}


def test_olmoe_predicts_text_it_has_not_seen() -> None:
    """The loss of a passage of the bundled text, recomputed here, is far below a uniform guess and a
    shuffled text's.
    """
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "olmoe_ref")
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "olmoe_ref", dtype=torch.float32)
    text = (
        "And it came to pass in those days, that there went out a decree from the king, that all the people"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        loss, other = (model(input_ids=x, labels=x).loss.item() for x in (ids, shuffled))
    assert loss < 5.0 < other


@pytest.mark.parametrize("name", HOSTS)
def test_tokenizer_round_trip(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(REFERENCE / name))
    text = "def f(x):\n\treturn x + 12  # naïve, Straße, 日本語"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 1
