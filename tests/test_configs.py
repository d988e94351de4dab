"""Every YAML file under conf/ is composed with the entries that offer it, and what it names can be made."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
#: Configuration folder -> its entry configurations. Every other file is an option of a group.
ENTRIES = {CONF: ("collect", "train", "benchmark"), CONF / "pretrain": ("config",)}
#: Values that an option leaves to the user.
REQUIRED = {
    "moe/hf": ["moe.path=some/model"],
    "text/datasets": ["text.name=some/dataset"],
    "text/directory": ["text.sources=some_texts"],
    "text/files": ["text.sources=[a.txt]"],
}
#: Options whose objects this machine cannot make: only their arguments are checked.
SIGNATURE_ONLY = {
    "text/datasets": "reads a data set",
    "text/directory": "reads files",
    "text/files": "reads files",
    "trainer/gpu": "needs a GPU",
    "hardware/local": "reads what was measured",
}


def groups(folder: Path, entry: str) -> dict[str, str | None]:
    """Group -> chosen option, from an entry's defaults list."""
    found: dict[str, str | None] = {}
    for item in OmegaConf.to_container(OmegaConf.load(folder / f"{entry}.yaml")).get("defaults", []):
        if isinstance(item, dict):
            ((name, option),) = item.items()
            found[name.split()[-1].split("@")[0]] = option
    return found


def options() -> Iterator[tuple[Path, str, str]]:
    """Every option file as (configuration folder, group, option)."""
    for folder in ENTRIES:
        for file in sorted(folder.rglob("*.yaml")):
            inner = any(
                other != folder and file.is_relative_to(other)
                for other in ENTRIES
                if other.is_relative_to(folder)
            )
            if file.parent != folder and not inner:
                yield folder, str(file.parent.relative_to(folder)), file.stem


OPTIONS = list(options())


def composed(folder: Path, entry: str, overrides: list[str], output: Path) -> DictConfig:
    """The configuration as an entry point sees it, with a run folder, every interpolation resolved."""
    if folder == CONF:
        importlib.import_module(entry)  # registers the resolvers that its configuration uses
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        cfg = compose(entry, overrides=overrides, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output)
        cfg.hydra.runtime.cwd = str(output)
        cfg.hydra.job.num = 0
        cfg.hydra.job.id = "0"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    return cfg


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``_target_``, outermost first."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{path}[{i}]")


def check_arguments(node: dict[str, Any]) -> None:
    """The target exists and takes these keywords."""
    call = get_object(node["_target_"])
    keywords = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    inspect.signature(call).bind_partial(*node.get("_args_", []), **keywords)


@pytest.mark.parametrize(
    ("folder", "entry"),
    [(f, e) for f, entries in ENTRIES.items() for e in entries],
    ids=lambda x: getattr(x, "name", x),
)
def test_entries_compose_and_name_what_exists(folder: Path, entry: str, tmp_path: Path) -> None:
    cfg = composed(folder, entry, [], tmp_path)
    for _, node in targets(OmegaConf.to_container(cfg)):
        check_arguments(node)


def test_every_file_belongs_to_an_entry() -> None:
    offered = {
        (folder, group) for folder, entries in ENTRIES.items() for e in entries for group in groups(folder, e)
    }
    assert [f"{group}/{option}" for folder, group, option in OPTIONS if (folder, group) not in offered] == []
    for folder, entries in ENTRIES.items():
        assert {file.stem for file in folder.glob("*.yaml")} == set(entries)


@pytest.mark.parametrize(
    ("folder", "group", "option"), OPTIONS, ids=[f"{f.name}-{g}-{o}" for f, g, o in OPTIONS]
)
def test_options_compose_with_every_entry_that_offers_them(
    folder: Path, group: str, option: str, tmp_path: Path
) -> None:
    key = f"{group}/{option}"
    entries = [entry for entry in ENTRIES[folder] if group in groups(folder, entry)]
    assert entries
    for entry in entries:
        cfg = composed(folder, entry, [f"{group}={option}", *REQUIRED.get(key, [])], tmp_path)
        plain = OmegaConf.to_container(cfg)
        assert isinstance(plain, dict)
        for _, node in targets(plain):
            check_arguments(node)
        mine = plain.get(group)
        if mine is None or key in SIGNATURE_ONLY:
            continue
        for _, node in targets(mine):
            if "_partial_" not in node and not any(v == "???" for v in node.values()):
                assert instantiate(node, _convert_="all") is not None
