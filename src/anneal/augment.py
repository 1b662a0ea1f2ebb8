"""The albumentations policy: presets, checking, seeding, serialisation, extra copies and the preview."""

from __future__ import annotations

from typing import Any, Literal

from anneal.params import Strict

Preset = Literal["none", "light", "standard", "strong"]


class CopiesConfig(Strict):
    """``augment.copies``: extra augmented samples written to disk."""

    balance: bool


class AugmentConfig(Strict):
    """Section ``augment``: a preset's name, or a list of albumentations transforms, each ``{Name: {argument: value}}``."""

    policy: Preset | list[str | dict[str, dict[str, Any] | None]]
    copies: CopiesConfig
