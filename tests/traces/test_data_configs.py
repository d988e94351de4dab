"""Every file in conf/data/ makes a data module, inside a whole configuration and alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from specgate.traces.datamodule import RoutingDataModule

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_configs_make_data_modules(config: Path) -> None:
    whole = OmegaConf.create({"paths": {"data": "elsewhere"}, "seed": 7, "data": OmegaConf.load(config)})
    dm = instantiate(whole).data
    assert isinstance(dm, RoutingDataModule)
    assert str(dm.paths[0]).startswith("elsewhere/traces/")
    assert dm.seed == 7
    assert dm.phase == ("decode" if config.stem.endswith(("_decode", "gpt_oss_20b")) else "prefill")
    assert dm.context == (32 if dm.phase == "decode" else 0)
    bare = instantiate(OmegaConf.create({"data": OmegaConf.load(config)})).data
    assert str(bare.paths[0]).startswith("data/traces/")


def test_the_configs_of_the_reference_traces_are_there() -> None:
    assert {c.stem for c in CONFIGS} >= {"switch_ref_encoder", "olmoe_ref_prefill", "gpt_oss_20b"}
