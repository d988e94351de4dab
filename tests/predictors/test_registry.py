"""Names of predictors."""

from __future__ import annotations

import pytest

from specgate.errors import CheckpointError, ConfigError
from specgate.predictors import predictor_class, predictor_names, register
from specgate.predictors.base import Predictor
from specgate.predictors.popularity import Popularity


def test_built_in_names_give_their_class() -> None:
    for name in predictor_names():
        cls = predictor_class(name)
        assert issubclass(cls, Predictor)
        assert cls.name == name


def test_an_own_predictor_gets_its_name() -> None:
    @register("always_the_same")
    class Mine(Popularity):
        """A predictor of one's own."""

    assert predictor_class("always_the_same") is Mine
    assert Mine.name == "always_the_same"
    assert Popularity.name == "popularity"
    with pytest.raises(ConfigError, match="taken"):
        register("markov")(Mine)

    class Other(Popularity):
        """Another one."""

    with pytest.raises(ConfigError, match="taken"):
        register("always_the_same")(Other)


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"'oracle9'.*popularity.*import the module"):
        predictor_class("oracle9")
