"""A processed data set and untrained members on disk, as the stages would leave them; for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from anneal.decoding import decode, resize
from anneal.models.build import build_classifier
from anneal.store import Sample, SplitWriter, Store, finish, open_store

CLASSES = ["cat", "dog, big", "été"]
PREPROCESSING = {"size": 8, "fit": "crop", "interpolation": "bilinear"}
COUNTS = {"train": 12, "val": 30, "test": 41}


def write_store(root: Path, classes: Sequence[str] = CLASSES) -> Store:
    """Write ``raw/<class>/<split>-<i>.png`` and the store made of them."""
    random = np.random.default_rng(0)
    folder = root / "data/processed"
    for name, count in COUNTS.items():
        writer = SplitWriter(folder / name, 8, 8, 3)
        for i in range(count):
            label = i % len(classes)
            source = f"{classes[label]}/{name}-{i:02d}.png"
            path = root / "raw" / source
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (10, 14, 3)) // 2 + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            image = resize(decode(path.read_bytes(), max_pixels=10**6), **PREPROCESSING)
            writer.add(image, Sample(source, "0" * 64, label, 14, 10))
        writer.close()
    statistics = {"mean": np.full(3, 0.4), "std": np.full(3, 0.2)}
    finish(folder, classes=classes, shape=(8, 8, 3), counts=COUNTS, normalize="standardize", statistics=statistics)
    return open_store(folder)


def write_member(root: Path, store: Store, name: str, seed: int, augmentation: Sequence[str] = ()) -> Path:
    """Write models/<name>/ of a small network with random weights."""
    torch.manual_seed(seed)
    geometry = {"height": 8, "width": 8, "channels": 3}
    architecture = {
        "name": "convnet",
        "arguments": {"widths": [8], "depth": 1},
        "num_classes": len(store.info.classes),
        "in_channels": 3,
        "height": 8,
        "width": 8,
    }
    normalization = {"kind": "standardize", **geometry}
    classifier = build_classifier(architecture, normalization, store.statistics())
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = root / "models" / name
    folder.mkdir(parents=True)
    save_file(
        {key: value.contiguous() for key, value in classifier.state_dict().items()}, folder / "weights.safetensors"
    )
    model = {
        "architecture": architecture,
        "normalization": normalization,
        "classes": store.info.classes,
        "preprocessing": PREPROCESSING,
        "augmentation": list(augmentation),
    }
    (folder / "model.json").write_text(json.dumps(model), encoding="utf-8")
    return folder
