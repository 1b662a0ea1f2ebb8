"""How many recipes have looked at a test split, as MLflow knows it: each look makes the next figure a little too good."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anneal.tracking.address import ENVIRONMENT, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "test.digest"
"""Tag of a parent run: which images its test split has, whatever else was done to the data."""

METRIC = "test/used_by_recipes"
"""Metric of a parent run: the number when its recipe was evaluated last."""


def recipes_on_test(client: MlflowClient, experiments: Sequence[str], digest: str) -> list[str]:
    """Return the recipes that have figures of this data set's test split, by their fingerprints, sorted.

    The same images under other preprocessing, or beside other training images, are the same test split.

    Parameters
    ----------
    client
        Of the store that is asked.
    experiments
        Ids of the experiments that count.
    digest
        Of the processed data, in dataset.json.
    """
    own = _tags(client, experiments, f"tags.`data.digest` = '{digest}'")
    found = _tags(client, experiments, f"tags.`data.digest` = '{digest}' and {LOOKED}")
    for split in sorted({tags[TAG] for tags in own if TAG in tags}):
        found += _tags(client, experiments, f"tags.`{TAG}` = '{split}' and {LOOKED}")
    return sorted({tags["fingerprint"] for tags in found if "fingerprint" in tags})


LOOKED = "metrics.`test/accuracy` >= 0"


def _tags(client: MlflowClient, experiments: Sequence[str], query: str) -> list[dict[str, str]]:
    """Return the tags of all runs that a query finds."""
    found: list[dict[str, str]] = []
    token = None
    while True:
        runs = client.search_runs(list(experiments), query, max_results=1000, page_token=token)
        found += [run.data.tags for run in runs]
        token = runs.token
        if not token:
            return found


def split_digest(data: Path) -> str | None:
    """Return what tells a store's test split from others, by its images' sources, hashes and labels; None where there is none."""
    table = data / "test" / "samples.parquet"
    return hashlib.sha256(table.read_bytes()).hexdigest()[:32] if table.exists() else None


def sentence(recipes: int) -> str:
    """Return the number of recipes in words.

    >>> sentence(1), sentence(7)
    ('test set used by 1 recipe', 'test set used by 7 recipes')
    """
    return f"test set used by {recipes} recipe{'' if recipes == 1 else 's'}"


def known_uses(uri: str, experiment: str, digest: str, *, patience: float = 10.0) -> int | None:
    """Return the number of recipes, asked for in a process of its own.

    Parameters
    ----------
    uri, experiment
        As in the section ``tracking``; MLFLOW_TRACKING_URI wins.
    digest
        As for `recipes_on_test`.
    patience
        Seconds that it may take.

    Returns
    -------
    int or None
        None where there is no store, or it does not answer in time.
    """
    address = tracking_uri(uri)
    file = re.match(r"sqlite:///([^?]+)", address)
    if file and not Path(file[1]).exists():  # mlflow would make one
        return None
    source = str(Path(__file__).resolve().parents[2])
    variables = {
        **ENVIRONMENT,
        **os.environ,
        "MLFLOW_TRACKING_URI": address,  # by the environment, since it may hold a password
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-P", "-m", "anneal.tracking.split_uses", experiment, digest]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=patience)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def main(experiment: str, digest: str) -> None:
    """Print the number of recipes."""
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        print(len(recipes_on_test(client, [found.experiment_id], digest)))


if __name__ == "__main__":
    main(*sys.argv[1:])
