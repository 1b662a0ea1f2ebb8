"""How much faster the training loader is than the usual one: ``python bench/loader.py``.

Ours is the data module's own training loader, with the model's first layer behind it: uint8 batches from the memory map,
augmented, normalised as a batch. The usual one is a DataLoader over images in memory with albumentations' Normalize and
ToTensorV2 for each sample. Both end in float32 batches (N, C, H, W), run in one process on one thread, and take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, Dataset

from anneal.augment import compile_policy
from anneal.batching import plan_run
from anneal.models.normalization import Normalization
from anneal.store import Sample, SplitWriter, finish, open_store
from anneal.training.data import MicrobatchDataset, StoreDataModule
from anneal.transforms import Cutout, RandomPadCrop

SIDE, BATCH, IMAGES = 32, 128, 1280
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]

FLIP = albumentations.HorizontalFlip(p=0.5)
CROP = [albumentations.Pad(4), albumentations.RandomCrop(SIDE, SIDE)]
DROP = albumentations.CoarseDropout(
    num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8), fill=127, p=1.0
)
OUR_CROP: list[Any] = [{"HorizontalFlip": {"p": 0.5}}, {"RandomPadCrop": {"padding": 0.125}}]
OUR_CUTOUT: list[Any] = [*OUR_CROP, {"Cutout": {"size": 0.25}}]

COMPARISONS: dict[str, tuple[list[Any], list[Any], float | None]] = {
    "flip + crop": (OUR_CROP, [FLIP, *CROP], 3.5),
    "flip + crop + cutout": (OUR_CUTOUT, [FLIP, *CROP, DROP], 2.5),
    "the same, our transforms in both": (OUR_CUTOUT, [FLIP, RandomPadCrop(), Cutout()], None),
}
"""What is compared: our policy, the usual transforms, the least ratio that we want."""


class Usual(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory, transformed one by one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transforms: list[Any]) -> None:
        self.images, self.labels = images, labels
        self.transform = albumentations.Compose([*transforms, albumentations.Normalize(MEAN, STD), ToTensorV2()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(image=self.images[i])["image"], int(self.labels[i])


def write_store(folder: Path) -> None:
    rng = np.random.default_rng(0)
    writer = SplitWriter(folder / "train", SIDE, SIDE, 3)
    for i in range(IMAGES):
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        writer.add(image, Sample(str(i), "0" * 64, i % 10, SIDE, SIDE))
    writer.close()
    statistics = {"mean": np.array(MEAN), "std": np.array(STD)}
    classes = [str(i) for i in range(10)]
    geometry: dict[str, Any] = {"shape": (SIDE, SIDE, 3), "counts": {"train": IMAGES}}
    finish(folder, classes=classes, normalize="standardize", statistics=statistics, **geometry)


def our_loader(folder: Path, policy: list[Any]) -> DataLoader[Any]:
    store = open_store(folder)
    data = MicrobatchDataset([store.split("train")], compile_policy(policy, height=SIDE, width=SIDE, channels=3), 0)
    steps = plan_run(size=BATCH, microbatch=BATCH, devices=1, num_nodes=1, num_samples=IMAGES, epochs=1)
    module = StoreDataModule(store, data, steps, seed=0, num_workers=0)
    here = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(global_rank=0, current_epoch=0, num_devices=1, strategy=here)  # type: ignore[assignment]
    return module.train_dataloader()


def seconds_ours(loader: DataLoader[Any], normalize: torch.nn.Module) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for batch in loader:
            images = normalize(batch.images)
    assert images.shape[1:] == (3, SIDE, SIDE) and images.dtype == torch.float32
    return time.perf_counter() - start


def seconds_usual(loader: DataLoader[Any]) -> float:
    start = time.perf_counter()
    for images, _ in loader:  # noqa: B007
        pass
    assert images.shape[1:] == (3, SIDE, SIDE) and images.dtype == torch.float32
    return time.perf_counter() - start


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30, help=f"interleaved blocks of {IMAGES} images each")
    blocks = parser.parse_args().blocks
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(
        f"{SIDE}x{SIDE} RGB, batches of {BATCH}, {blocks} interleaved blocks of {IMAGES} images, one thread", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder)
        store = open_store(folder)
        split = store.split("train")
        normalize = Normalization("standardize", store.statistics(), SIDE, SIDE, 3)
        memory = split.take(np.arange(IMAGES))
        for title, (policy, usual, wanted) in COMPARISONS.items():
            ours = our_loader(folder, policy)
            theirs = DataLoader(Usual(memory, split.labels, usual), batch_size=BATCH, shuffle=True)
            seconds_ours(ours, normalize), seconds_usual(theirs)
            times = []
            for block in range(blocks):
                if block % 2:
                    theirs_took = seconds_usual(theirs)
                    times.append((seconds_ours(ours, normalize), theirs_took))
                else:
                    times.append((seconds_ours(ours, normalize), seconds_usual(theirs)))
            taken = np.array(times)
            ratios = taken[:, 1] / taken[:, 0]
            low, high = interval(ratios)
            rates = IMAGES / np.median(taken, axis=0)
            goal = f", wanted at least {wanted}" if wanted else ""
            print(
                f"{title}: {np.median(ratios):.2f} x (95 % interval {low:.2f} to {high:.2f}){goal}; "
                f"{rates[0]:,.0f} against {rates[1]:,.0f} images/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
