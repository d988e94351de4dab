"""Profiles of machines: those of conf/hardware, what they refuse, and the measured one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from specgate.errors import ConfigError
from specgate.policy.hardware import VARIABLE, Hardware, local, profile_path, save
from specgate.training import make
from tests.policy.machines import machine
from tests.test_configs import CONF

PROFILES = sorted(p.stem for p in (CONF / "hardware").glob("*.yaml") if p.stem != "local")
DISKS = sorted(p.stem for p in (CONF / "nvme").glob("*.yaml"))


def composed(name: str, nvme: str = "gen4") -> Hardware:
    cfg = OmegaConf.create(
        {
            "nvme": OmegaConf.load(CONF / "nvme" / f"{nvme}.yaml"),
            "hardware": OmegaConf.load(CONF / "hardware" / f"{name}.yaml"),
        }
    )
    made: Hardware = instantiate(cfg.hardware, _convert_="all")
    return made


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_of_its_name_and_makes_sense(name: str) -> None:
    found = composed(name)
    assert found.name == name
    assert not found.measured
    assert found.source
    # Whatever the machine: device memory is faster than host memory, that than the link, that than a disk.
    assert found.device_gb_per_s > found.host_gb_per_s > found.link_gb_per_s > found.file_gb_per_s
    assert found.free_gb == found.device_gb - found.reserved_gb > 0


def test_profiles_are_the_issue_s() -> None:
    assert {"rtx3090", "rtx4090", "a6000", "h100_pcie", "laptop_8gb"} <= set(PROFILES)
    card = composed("rtx3090")
    assert (card.device_gb, card.device_gb_per_s, card.link_gb_per_s < 31.5) == (24, 936, True)


def test_disks_get_faster_from_class_to_class() -> None:
    speeds = [composed("rtx3090", disk).file_gb_per_s for disk in ("sata", "gen3", "gen4", "gen5")]
    assert speeds == sorted(speeds)
    assert set(DISKS) == {"sata", "gen3", "gen4", "gen5"}
    assert composed("rtx3090", "sata").file == "SATA SSD"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("device_gb", 0, "hardware.device_gb=0 of box"),
        ("device_gb", -8, "hardware.device_gb=-8"),
        ("link_gb_per_s", float("nan"), "hardware.link_gb_per_s=nan"),
        ("host_gb", "much", "hardware.host_gb=much"),
        ("kernel_us", -1, "hardware.kernel_us=-1"),
        ("device_share", 1.5, "more than all"),
        ("tflops_share", 0, "hardware.tflops_share=0"),
        ("reserved_gb", 8, "leaves nothing of the 8 GB"),
        ("pageable_gb_per_s", 0, "hardware.pageable_gb_per_s=0"),
        ("gathered_gb_per_s", 0, "hardware.gathered_gb_per_s=0"),
        ("operation_us", -1, "hardware.operation_us=-1"),
        ("readback_us", float("inf"), "hardware.readback_us=inf"),
        ("kernel_us", None, "hardware.kernel_us=None"),
        ("launch_slowdown", -0.1, "hardware.launch_slowdown=-0.1"),
        ("launch_slowdown", float("inf"), "hardware.launch_slowdown=inf"),
        ("launch_slowdown", None, "hardware.launch_slowdown=None"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        machine(**{name: value})
    assert str(raised.value).count(". ") == 0


def test_a_measured_profile_survives_the_disk(tmp_path: Path) -> None:
    made = machine(
        measured=True,
        pageable_gb_per_s=6.5,
        launch_slowdown=0.125,
        readings={"copies": [{"bytes": 4096, "ns": 3.5}], "slowed": None},
    )
    path = save(made, tmp_path / "deep" / "local.yaml")
    assert local(path) == made
    assert local(path).launch_slowdown == 0.125
    assert [p.name for p in path.parent.iterdir()] == ["local.yaml"], "nothing is left beside it"


def test_a_profile_of_before_has_no_slower_launches(tmp_path: Path) -> None:
    path = save(machine(measured=True, launch_slowdown=0.5), tmp_path / "local.yaml")
    lines = [line for line in path.read_text().splitlines() if "launch_slowdown" not in line]
    path.write_text("\n".join(lines))
    assert local(path).launch_slowdown == 0


def test_where_the_profile_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path() == tmp_path / "specgate" / "hardware" / "local.yaml"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine.yaml"))
    assert profile_path() == tmp_path / "mine.yaml"
    assert profile_path(tmp_path / "other.yaml") == tmp_path / "other.yaml"


def test_a_machine_that_was_never_measured_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"never measured.*run python -m specgate\.policy\.measure once"):
        local(tmp_path / "local.yaml")


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "name: x", "name: [", "name: x\nrm: yes", "device_gb: -1"], ids=range(6)
)
def test_a_damaged_profile_says_what_to_run(text: str, tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"no measured profile.*specgate\.policy\.measure again"):
        local(path)


def test_a_configured_machine_that_was_never_measured_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """By what the entry points make objects with: Hydra's own error would hide the sentence."""
    cfg = OmegaConf.load(CONF / "hardware" / "local.yaml")
    cfg.path = str(tmp_path / "local.yaml")
    with pytest.raises(ConfigError, match="was never measured"):
        make(cfg)


def test_local_is_configured(tmp_path: Path) -> None:
    made = machine(measured=True)
    cfg = OmegaConf.load(CONF / "hardware" / "local.yaml")
    cfg.path = str(save(made, tmp_path / "local.yaml"))
    assert instantiate(cfg) == made
