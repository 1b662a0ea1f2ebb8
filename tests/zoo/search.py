"""Searches with atheris, which is guided by the readers' coverage, for files that break a promise.

``python -m tests.zoo.search TARGET SECONDS FOLDER`` ends with code 0, or leaves what it found in FOLDER.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["tarfile", "zipfile", "gzip", "_compression", "PIL", "anneal.sources", "anneal.decoding"],
    enable_loader_override=False,
):
    from tests.zoo.fuzz import TARGETS, prepare, taste


def main(name: str, seconds: int, folder: Path) -> None:
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(prepare(target, folder)):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        taste(target, data, folder)

    warnings.simplefilter("ignore")
    limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=1024", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}{os.sep}", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
