"""Faults planted in the data are what the report tells its reader to look at first."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.conftest import ROOT, make_clone

LEAKED, WRONG = 40, 0.05
"""Test images that are copied into train, and the share of training images with another label."""


def plant(folder: Path) -> set[str]:
    """Write digits as train/ and test/, with copies of test images in train, as JPEG, and with wrong labels in train.

    Returns the names of the files whose label is wrong.
    """
    random = np.random.default_rng(0)
    leaked, wrong = 0, set[str]()
    with zipfile.ZipFile(ROOT / "data/digits.zip") as archive:
        for number, name in enumerate(sorted(archive.namelist())):
            digit, file = name.split("/")
            image = Image.open(io.BytesIO(archive.read(name))).resize((32, 32), Image.Resampling.BICUBIC)
            split = "test" if number % 5 == 0 else "train"
            if split == "train" and random.random() < WRONG:
                digit = str((int(digit) + random.integers(1, 10)) % 10)
                wrong.add(file)
            (folder / split / digit).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / digit / file)
            if split == "test" and leaked < LEAKED and random.random() < 0.2:
                leaked += 1
                (folder / "train" / digit).mkdir(parents=True, exist_ok=True)
                image.save(folder / "train" / digit / f"scan-{leaked}.jpg", quality=70)
    assert leaked == LEAKED
    return wrong


@pytest.mark.long
def test_a_leak_label_noise_and_a_small_validation_split_come_first(tmp_path: Path) -> None:
    clone = make_clone(tmp_path)
    wrong = plant(clone.path / "data/planted")
    clone.set(
        data__path="data/planted",
        preprocess__size=16,
        split__val=0.02,
        trainer__epochs=8,
        ensemble__members={"a": {"seed": 0}},
        evaluate__bootstrap=200,
    )
    clone.repro()
    html = (clone.path / "reports/report.html").read_text(encoding="utf-8")
    if kept := os.environ.get("ANNEAL_SCREENSHOTS"):
        (Path(kept) / "planted.html").write_text(html, encoding="utf-8")
    first = html.split('<section id="first">')[1].split("</section>")[0]
    said = [" ".join(re.sub("<[^>]*>", " ", entry).split()) for entry in first.split("<li>")[1:]]
    titles = [entry.split(" :")[0] for entry in said]
    assert {"leak", "label noise", "validation split too small"} <= set(titles), said

    leak = next(entry for entry in said if entry.startswith("leak"))
    found = re.search(r"([0-9]+) of [0-9]+ test images", leak)
    assert found is not None and 0.9 * LEAKED <= int(found[1]) <= 1.3 * LEAKED, leak
    assert clone.json("reports/evaluation/near_duplicates.json")["verdict"] in leak
    named = {Path(item["source"]).name for item in clone.json("reports/evaluation/label_errors.json")["items"]}
    assert len(named & wrong) >= 0.7 * max(len(named), len(wrong)), (sorted(named), sorted(wrong))
