"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import anneal

MODULES = sorted(
    found.name for found in pkgutil.walk_packages(anneal.__path__, "anneal.") if not found.name.endswith("__main__")
)


def test_every_module_is_looked_at() -> None:
    assert {"anneal.metrics", "anneal.search.results", "anneal.reporting.report.charts"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not found.failed
