"""The public names are what they are called, whatever else has been imported before."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import llmlite
from llmlite.errors import ConfigError


def test_no_module_of_the_package_hides_a_public_name() -> None:
    modules = {info.name for info in pkgutil.iter_modules(llmlite.__path__)}
    assert not modules & set(llmlite.__all__)


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    importlib.import_module("llmlite.pipeline")
    for name in llmlite.__all__:
        assert getattr(llmlite, name) is not None
        assert name == "__version__" or getattr(llmlite, name).__doc__


def test_options_beside_a_recipe_are_not_left_unread() -> None:
    with pytest.raises(ConfigError, match="seed: options go with a file"):
        llmlite.run(llmlite.Recipe(steps=[llmlite.Quantize()]), seed=1)
