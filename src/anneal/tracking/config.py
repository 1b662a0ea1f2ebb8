"""Sections ``tracking`` and ``registry`` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from anneal.params import Strict


class TrackingConfig(Strict):
    """Section ``tracking``: where runs go; tracked by no stage."""

    uri: Annotated[str, Field(min_length=1)]
    experiment: Annotated[str, Field(min_length=1)]


class RegistryConfig(Strict):
    """Section ``registry``: the registered model's name, or null to register nothing."""

    name: Annotated[str, Field(min_length=1)] | None
