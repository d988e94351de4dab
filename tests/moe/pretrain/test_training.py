"""A run that is interrupted and resumed ends where an uninterrupted one ends; the command makes a
model that loads.
"""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specgate.errors import ConfigError
from specgate.moe.pretrain.module import Pretraining, PretrainingData, build
from specgate.moe.pretrain.tokens import prepare
from tests.moe.pretrain.test_grouped import OLMOE, SWITCH
from tests.moe.pretrain.test_tokens import write

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    write(folder / "text", "a", 30)
    prepare(folder / "c", str(folder / "text"), vocab_size=400, heldout_characters=2000)
    return folder


def fit(
    corpus: Path, family: str, steps: int, folder: Path, ckpt: str | None = None
) -> tuple[Pretraining, str]:
    L.seed_everything(0)
    architecture = (SWITCH if family == "switch" else OLMOE) | {"vocab_size": 400}
    module = Pretraining(family, architecture, total_steps=6, warmup_steps=2)
    objective = "switch" if family == "switch" else "causal"
    data = PretrainingData(str(corpus / "c"), objective, 200, 16, 6, num_workers=0)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    path = str(folder / f"{steps}.ckpt")
    trainer.save_checkpoint(path)
    return module, path


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_resumed_run_equals_uninterrupted(corpus: Path, tmp_path: Path, family: str) -> None:
    whole, _ = fit(corpus, family, 6, tmp_path)
    _, half = fit(corpus, family, 3, tmp_path)
    resumed, _ = fit(corpus, family, 6, tmp_path, half)
    fresh = build(family, dict(whole.hparams["architecture"]))
    assert int(resumed.tokens_seen) == int(whole.tokens_seen) > 0
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(
        not torch.equal(a, b) for a, b in zip(whole.model.parameters(), fresh.parameters(), strict=True)
    )


def test_unknown_family() -> None:
    with pytest.raises(ConfigError, match="'mixtral'"):
        build("mixtral", {})


@pytest.mark.slow
def test_command_ends_with_a_model_that_loads(corpus: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "specgate.moe.pretrain", "moe=olmoe_ref", "tokens=1200", "tokens_per_step=600",
        "precision=32-true", "accelerator=cpu", "progress=false", "num_workers=0", f"output={tmp_path}",
        f"corpus.directory={corpus / 'c'}", f"corpus.sources={corpus / 'text'}", "corpus.vocab_size=400",
        "corpus.heldout_characters=2000", "corpus.exclude_bundled=true", "evaluate.length=16",
        "moe.architecture.hidden_size=32", "moe.length=64",
    ]  # fmt: skip
    refused = subprocess.run([*command, "corpus.seed=5"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "prepared with" in refused.stderr
    command[command.index("corpus.vocab_size=400") + 1 :] = [
        "corpus.heldout_characters=2000", "evaluate.length=16",
        "moe.architecture.hidden_size=32", "moe.length=64",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip().splitlines()[-1]) == tmp_path / "metrics.json"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["evaluation"]["load_entropy"]) == 8
    assert set(metrics["evaluation"]["loss"]["a"]) == {"model", "tokens", "unigram", "4-gram"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) <= 400
    assert "4-gram" in (tmp_path / "model" / "README.md").read_text()
