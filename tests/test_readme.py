"""Every command in README.md, CONTRIBUTING.md and docs/ is known here and is run, a long one in a quick form.

A command that stands in a document and not in COMMANDS fails the first test: write down how it is tested.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specgate import demo
from specgate.predictors.registry import predictor_class
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import save_predictor

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
GENERATED = {"RESULTS.md", "LOG.md"}

COLLECT = ("sequences=24", "length=16", "prompt_length=8", "batch_size=8", "threads=1", "paths.data={new}")
TRAIN = (
    "trainer=debug",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "logger=none",
    "data.window=32",
    "threads=1",
    "paths.data={data}",
)


@dataclass(frozen=True)
class Make:
    """A make target: what it would run (``make -n``) must hold these; the test of what it runs is named."""

    runs: tuple[str, ...]
    tested_by: str


@dataclass(frozen=True)
class Run:
    """A command that is run for real: with replaced words, and overrides that make it quick.

    ``{data}`` is a folder with tiny traces under the names of the reference models', ``{new}`` an empty one.
    """

    more: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    prints_metrics: bool = True
    in_scratch: bool = False


HOST = {"path/to/model": "{olmoe}", "path/to/texts": "{text}"}
HELP = Run(("--help",), prints_metrics=False)
SCRATCH = Run(prints_metrics=False, in_scratch=True)
CONVERT = "python -m specgate.traces.convert"
PACK = "python -m specgate.runtime.pack"
RUN = "outputs/train/2026-01-31/12-00-00"
SCORE = ("paths.data={data}", "data.window=32", "threads=1")
COST = (
    *("data=olmoe_ref_prefill", "cost.context=16", "cost.repeats=3", "cost.batch_sizes=[1]"),
    "'+cost.hosts.olmoe={model_type: olmoe, hidden_size: 32, num_experts: 8, num_experts_per_tok: 2}'",
)
MEMBERS = {"outputs/multirun/members": "{members}"}
COMMANDS: dict[str, Make | Run] = {
    "make demo": Make(("python -m specgate.demo",), "tests/test_demo.py"),
    "make test": Make(("python -m pytest",), "tests/test_packaging.py"),
    "make setup": Make(
        ("-m venv .venv", "--constraint constraints.txt", "--editable"), "tests/test_packaging.py"
    ),
    "make native": Make(("--no-deps", "SPECGATE_CUDA=AUTO"), "tests/runtime/test_native.py"),
    "make native SPECGATE_CUDA=OFF": Make(("SPECGATE_CUDA=OFF",), "tests/runtime/test_native.py"),
    "make test-native": Make(("--target native_tests", "ctest"), "tests/native/check.h"),
    "make sanitize": Make(("address thread", "-DSPECGATE_SANITIZE=", "ctest"), "tests/native/check.h"),
    "make lint types": Make(("ruff check", "ruff format --check", "mypy"), "tests/test_house_rules.py"),
    "make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu": Make(
        ("--index-url https://download.pytorch.org/whl/cpu 'torch==",), "tests/test_packaging.py"
    ),
    "make docs": Make(
        ("python -m specgate.report.readme", "python -m specgate.report.results"), "tests/test_docs.py"
    ),
    "make lock": Make(("-m pip freeze",), "tests/test_packaging.py"),
    "make help": Make(("awk",), "tests/test_packaging.py"),
    "python collect.py": HELP,
    "python train.py": HELP,
    "python benchmark.py": HELP,
    "python -m specgate doctor": Run(("--help",), prints_metrics=False),
    CONVERT: HELP,
    "python -m specgate.moe.pretrain": HELP,
    "python -m specgate.moe.generate": HELP,
    "python -m benchmarks.zoo": Run(("--dry-run",), prints_metrics=False),
    "python collect.py moe=olmoe_ref": Run(COLLECT),
    "python collect.py moe=olmoe_ref phase=decode sequences=500": Run(COLLECT),
    "python collect.py moe=switch_ref hidden=int8 'hidden_layers=[0,2,4]'": Run(COLLECT),
    "python collect.py moe=hf moe.path=path/to/model text=directory text.sources=path/to/texts": Run(
        COLLECT, HOST
    ),
    "python collect.py moe=hf moe.path=path/to/model sequences=32 out=/tmp/try": Run(
        COLLECT, {"path/to/model": "{olmoe}", "/tmp/try": "{new}"}
    ),
    "python -m specgate.moe.generate olmoe_ref --documents 30000 --out data/text/olmoe_ref.txt.xz": Run(
        ("--documents", "2"), {"data/text/": "{new}/"}, prints_metrics=False
    ),
    "python collect.py moe=olmoe_ref text=files text.sources=data/text/olmoe_ref.txt.xz text.split=train "
    "sequences=30000 out=data/traces/olmoe_ref_written": Run(
        COLLECT, {"data/text/olmoe_ref.txt.xz": "{text}", "data/traces/": "{new}/"}
    ),
    "python train.py data=olmoe_ref_prefill "
    "'data.traces=[data/traces/olmoe_ref,data/traces/olmoe_ref_written]'": Run(
        TRAIN,
        {"data/traces/olmoe_ref_written": "{data}/traces/olmoe_ref_shift", "[data/traces": "[{data}/traces"},
    ),
    "python collect.py moe=olmoe_ref text=directory text.sources=my_texts text.split=train text.prefix=mine_ "
    "text.exclude_bundled=true sequences=100000 out=data/traces/olmoe_ref_mine": Run(
        COLLECT, {"my_texts": "{text}", "data/traces/": "{new}/"}
    ),
    "python train.py model=router_residual lookahead=3 data=olmoe_ref_prefill": Run(TRAIN),
    "python train.py model=linear": Run(TRAIN, {"model=linear": "model=mlp"}),
    f"python benchmark.py mode=accuracy data=olmoe_ref_prefill checkpoints=[{RUN}]": Run(
        ("paths.data={data}", "data.window=32", "threads=1"), {RUN: "{run}"}
    ),
    "python train.py model=router_residual calibration=temperature calibration.conformal=true": Run(TRAIN),
    "python train.py callbacks=quantized callbacks.quantize.bits=4": Run(TRAIN),
    "python train.py -m model=router_residual seed=0,1,2,3,4 hydra.sweep.dir=outputs/multirun/members": Run(
        TRAIN, {"0,1,2,3,4": "0,1", "outputs/multirun/members": "{new}/members"}, prints_metrics=False
    ),
    "python train.py model=ensemble 'model.checkpoints=[outputs/multirun/members]'": Run(TRAIN, MEMBERS),
    "python collect.py moe=olmoe_ref text=directory text.sources=../shared/corpora/domain-shift "
    "out=data/traces/olmoe_ref_shift": Run(
        COLLECT, {"../shared/corpora/domain-shift": "{text}", "data/traces/olmoe_ref_shift": "{new}/shift"}
    ),
    "python benchmark.py mode=calibration data=[olmoe_ref_prefill] shift=[olmoe_ref_shift] "
    "checkpoints=[outputs/train/my_run]": Run(
        (*SCORE, "calibrate.drift.stream=200", "calibrate.drift.block=16", "calibrate.match=shape"),
        {"outputs/train/my_run": "{run}"},
    ),
    "python benchmark.py mode=uncertainty 'data=[olmoe_ref_prefill,olmoe_ref_shift]' "
    "'checkpoints=[outputs/multirun/members]'": Run(SCORE, MEMBERS),
    "python benchmark.py mode=cost checkpoints=[...]": Run((*SCORE, *COST), {"...": "{run}"}),
    "python benchmark.py mode=quantize checkpoints=[...]": Run(
        (*SCORE, "data=olmoe_ref_prefill", "quantize.context=16", "quantize.repeats=3"), {"...": "{run}"}
    ),
    "python benchmark.py mode=transitions data=[gpt_oss_20b,olmoe_ref_prefill]": Run(
        SCORE, {"gpt_oss_20b": "olmoe_ref_decode"}
    ),
    "python benchmark.py mode=plan moe=gpt_oss_20b hardware=rtx3090 budget_gb=10": Run(
        ("paths.data={data}", "plan.documents=1", "plan.tokens=8", "plan.train_documents=1", "threads=1")
    ),
    "python benchmark.py mode=simulate data=gpt_oss_20b shape=gpt_oss_20b "
    "checkpoints=[outputs/train/my_run]": Run(
        (*SCORE, "simulate.resamples=100", "'simulate.residency=[0.5]'"),
        {
            "shape=gpt_oss_20b": "shape=tiny",
            "data=gpt_oss_20b": "data=olmoe_ref_prefill",
            "outputs/train/my_run": "{run}",
        },
    ),
    "python benchmark.py mode=simulate data=gpt_oss_20b shape=gpt_oss_20b "
    'checkpoints=[outputs/train/my_run] \'simulate.policies=[lru,priced,"rl steps=100000 seed=0",'
    '"rl steps=100000 seed=1","rl algorithm=dqn",bandit,oracle]\'': Run(
        (*SCORE, "simulate.resamples=100", "'simulate.residency=[0.5]'", "'simulate.hardware=[rtx3090]'"),
        {
            "shape=gpt_oss_20b": "shape=tiny",
            "data=gpt_oss_20b": "data=olmoe_ref_prefill",
            "outputs/train/my_run": "{run}",
            "steps=100000": "steps=200",
            "algorithm=dqn": "algorithm=dqn steps=200",
        },
    ),
    "python -m specgate.policy.measure": HELP,
    "python -m specgate.report.validate": HELP,
    "python -m benchmarks.simulator": HELP,
    PACK: HELP,
    f"{PACK} moe=olmoe_ref": Run(("out={new}/a.experts",), prints_metrics=False),
    f"{PACK} moe=path/to/model codec=int4 group=64": Run(
        ("out={new}/b.experts",), {"path/to/model": "{olmoe}"}, prints_metrics=False
    ),
    f"{PACK} moe=olmoe_ref codec=int8 zstd=true out=olmoe.experts": SCRATCH,
    f"{CONVERT} request-*.npy data/traces/mine --experts 128 --model-id me/model": SCRATCH,
    f"{CONVERT} gpt_oss_20b_decode.npz data/traces/gpt_oss_20b --experts 32 --model-id openai/gpt-oss-20b "
    "--family gpt_oss --meta gpt_oss_20b_decode.meta.json --document-key dataset,category,prompt_tokens "
    "--domain-key dataset": SCRATCH,
    f"{CONVERT} data/traces/mine mine.parquet": SCRATCH,
    f"{CONVERT} mine.parquet data/traces/again": SCRATCH,
    f"{CONVERT} data/traces/mine mine.npz": SCRATCH,
}
#: Commands in running text that only point at one that is tested in full elsewhere.
MENTIONED = {
    *("source .venv/bin/activate", "python -m specgate.report.sweep FOLDER", "python train.py -m"),
    *(
        f"python benchmark.py mode={m}"
        for m in (
            "cost",
            "calibration",
            "uncertainty",
            "quantize",
            "transitions",
            "live",
            "replay",
            "simulate",
            "plan",
        )
    ),
}


def commands_of(page: Path) -> list[str]:
    """Lines of bash blocks, and commands in backquotes, without their comments; not the generated parts."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", page.read_text(), flags=re.DOTALL)
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"`((?:python|make|source) [^`]+)`", plain)
    found = [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines]
    return list(dict.fromkeys(line for line in found if line and not line.startswith("#")))


def expanded(command: str) -> list[str]:
    """``make lint types test`` is in COMMANDS as its parts."""
    if command in COMMANDS or not re.fullmatch(r"make [a-z ]+", command):
        return [command]
    return [f"make {target}" for target in command.split()[1:]]


FOUND = sorted({c for page in PAGES if page.name not in GENERATED for c in commands_of(page)})


def test_every_command_is_known_and_every_known_one_is_in_a_document() -> None:
    unknown = [command for command in FOUND if command not in COMMANDS and command not in MENTIONED]
    assert unknown == [], "say in COMMANDS how these are tested"
    assert [command for command in COMMANDS if command not in FOUND] == []


def test_the_commands_of_the_demo_are_those_that_it_runs_today() -> None:
    shown = re.findall(r"\| `(python [^`]+)` \| \d+ \|", (ROOT / "README.md").read_text())
    assert shown == [step.shown for step in demo.plan(Path("outputs/demo"))], "run make demo, then make docs"


def test_the_offloading_of_the_readme_runs(
    tiny_olmoe: Path, tiny_traces: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    trained(tiny_traces["olmoe_decode"], "decode", tmp_path / "outputs" / "train")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"prompt": torch.arange(8)[None]}
    exec(code.replace("olmoe_ref", str(tiny_olmoe)), namespace)
    assert namespace["model"].specgate.stats()["miss"] > 0


@pytest.mark.parametrize("command", [c for c, how in COMMANDS.items() if isinstance(how, Make)])
def test_make_targets_run_what_they_say(command: str) -> None:
    how = COMMANDS[command]
    assert isinstance(how, Make)
    dry = ["make", "--dry-run", "--always-make", *shlex.split(command)[1:]]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [text for text in how.runs if text not in done.stdout] == []
    assert (ROOT / how.tested_by).is_file()


@pytest.fixture(scope="module")
def places(
    tiny_traces: dict[str, Path], tiny_olmoe: Path, tiny_text: Path, tmp_path_factory
) -> dict[str, Path]:
    data, scratch = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("scratch")
    (data / "traces").mkdir()
    for name, trace in tiny_traces.items():
        host, _, phase = name.partition("_")
        (data / "traces" / f"{host}_ref{'_' + phase if phase else ''}").symlink_to(trace)
    (data / "traces" / "olmoe_ref_shift").symlink_to(tiny_traces["olmoe"])
    rng = np.random.default_rng(0)
    for i in range(12):
        chosen = rng.permuted(np.tile(np.arange(128), (20, 6, 1)), axis=-1)[..., :8]
        np.save(scratch / f"request-{i}.npy", chosen.astype(np.uint8))
    chosen = rng.permuted(np.tile(np.arange(32), (240, 3, 1)), axis=-1)[..., :4].astype(np.uint8)
    np.savez(scratch / "gpt_oss_20b_decode.npz", experts=chosen, seq_id=np.repeat(np.arange(12), 20))
    meta = ",".join(
        f'{{"seq": {i}, "dataset": "a", "category": "c{i}", "prompt_tokens": 9}}' for i in range(12)
    )
    (scratch / "gpt_oss_20b_decode.meta.json").write_text(f"[{meta}]")
    names = {"data": data, "scratch": scratch, "olmoe": tiny_olmoe, "text": tiny_text}
    members = tmp_path_factory.mktemp("members")
    runs = [trained(tiny_traces["olmoe"], "prefill", members / str(i)).parent for i in range(2)]
    return {**names, "run": runs[0], "members": members}


def trained(trace: Path, phase: str, folder: Path) -> Path:
    """A checkpoint of a predictor made for a trace, with router weights and untrained correction."""
    data = RoutingDataModule(trace, phase=phase, window=32)
    model = predictor_class("router_residual")(**vars(data.spec), routers=data.routers, lookahead=3)
    return save_predictor(model, folder / "predictor.ckpt")


def test_the_python_of_the_readme_runs(
    tiny_traces: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    trained(tiny_traces["olmoe_decode"], "decode", tmp_path / "outputs" / "train")
    (tmp_path / "data/traces").mkdir(parents=True)
    (tmp_path / "data/traces/olmoe_ref_decode").symlink_to(tiny_traces["olmoe_decode"])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    p_HE = namespace["forecast"].p_HE
    assert p_HE.shape == (3, 8)
    assert bool(((p_HE >= 0) & (p_HE <= 1)).all())
    assert namespace["forecast"].next_token_H.all(), (
        "the last token is done, so all of it lies in the next one"
    )


@pytest.mark.parametrize("command", [c for c, how in COMMANDS.items() if isinstance(how, Run)])
def test_commands_run(command: str, places: dict[str, Path], tmp_path: Path) -> None:
    how = COMMANDS[command]
    assert isinstance(how, Run)
    line = command
    for word, other in how.instead.items():
        line = line.replace(word, other)
    entry = re.match(r"python (collect|train|benchmark)\.py", command)
    more = [*how.more, f"hydra.run.dir={tmp_path}/run"] if entry and how.prints_metrics else [*how.more]
    line = " ".join([line, *more])
    for name, path in {**places, "new": tmp_path / "new"}.items():
        line = line.replace(f"{{{name}}}", str(path))
    folder = places["scratch"] if how.in_scratch else ROOT
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if how.prints_metrics:
        last = Path(done.stdout.strip().splitlines()[-1])
        assert last.name == "metrics.json"
        assert (ROOT / last).is_file()
