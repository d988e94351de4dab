"""Names of policies, their configurations and their paragraphs belong together."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from specgate.errors import ConfigError
from specgate.policy.bandit import Bandit
from specgate.policy.registry import POLICIES, SELECTION, policy, policy_class

ROOT = Path(__file__).parent.parent.parent


def test_every_policy_has_a_configuration_and_a_paragraph() -> None:
    names = {*POLICIES, SELECTION}
    assert {f.stem for f in (ROOT / "conf" / "policy").glob("*.yaml")} == names
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "policies.md").read_text(), re.MULTILINE)
    assert names <= set(headings)


@pytest.mark.parametrize("name", [*POLICIES, SELECTION])
def test_a_configuration_states_every_option_with_its_default_and_a_comment(name: str) -> None:
    text = (ROOT / "conf" / "policy" / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    cls = Bandit if name == SELECTION else policy_class(name)
    assert cls.name == name
    assert values.pop("_target_") == f"{cls.__module__}.{cls.__qualname__}"
    parameters = inspect.signature(cls).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}
    assert values == json.loads(json.dumps(defaults))  # tuples are lists in YAML
    for option in values:
        assert re.search(rf"^{option}: .*# \S", text, re.MULTILINE), option


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="policy=best is unknown; choose one of on_demand, static"):
        policy("best")
    with pytest.raises(ConfigError, match="policy=lru does not take these options"):
        policy("lru", depth=3)
