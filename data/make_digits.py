"""Write data/digits.zip: scikit-learn's optical digits as class folders of PNG files, the same bytes on every run."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main() -> None:
    """Write digits.zip beside this file; values 0..16 become 0..255."""
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)
    with zipfile.ZipFile(Path(__file__).with_name("digits.zip"), "w", zipfile.ZIP_STORED) as archive:
        order = sorted(range(len(images)), key=lambda index: (digits.target[index], index))
        for index in order:
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "PNG", optimize=True)
            member = zipfile.ZipInfo(f"{digits.target[index]}/{index:04d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o644 << 16
            archive.writestr(member, png.getvalue())


if __name__ == "__main__":
    main()
