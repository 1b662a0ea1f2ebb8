"""How far a long loop is: a bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Chunk = TypeVar("Chunk", bound=Sized)

SECONDS = 5.0
"""Between two plain lines."""


def progress(chunks: Iterable[Chunk], total: int, *, name: str, unit: str = "images") -> Iterator[Chunk]:
    """Yield chunks and show on stderr how many of ``total`` values are through, how many a second, and the time left."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, unit=f" {unit}", unit_scale=True, dynamic_ncols=True) as bar:
            for chunk in chunks:
                yield chunk
                bar.update(len(chunk))
        return
    start = last = time.monotonic()
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        now = time.monotonic()
        if now - last >= SECONDS:
            last = now
            rate = done / (now - start)
            left = f"{(total - done) / rate:,.0f} s left"
            print(f"{name}: {done:,} of {total:,} {unit}, {_pace(rate)}, {left}", file=sys.stderr, flush=True)
    seconds = max(time.monotonic() - start, 1e-9)
    print(f"{name}: {done:,} {unit} in {seconds:.1f} s, {_pace(done / seconds)}", file=sys.stderr, flush=True)


def _pace(rate: float) -> str:
    """Return how many a second, or how long each takes where that is more than one.

    >>> _pace(1234.5), _pace(0.0625)
    ('1,234/s', '16 s each')
    """
    return f"{rate:,.0f}/s" if rate >= 1 or rate <= 0 else f"{1 / rate:,.0f} s each"
