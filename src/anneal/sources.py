"""Raw data in: folder, zip/tar, IDX, CIFAR binary, CSV/Parquet table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anneal.params import Strict

Format = Literal["auto", "folder", "archive", "idx", "cifar", "table"]


class DataConfig(Strict):
    """Section ``data``: where the images are and what is refused."""

    path: Annotated[str, Field(min_length=1)]
    format: Format
    limit: Annotated[int, Field(ge=1)] | None
    max_rejected: Annotated[float, Field(ge=0, le=1)]
    max_pixels: Annotated[int, Field(ge=1)]
