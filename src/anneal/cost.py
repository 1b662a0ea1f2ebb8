"""What a prediction costs: parameters, multiply-adds and forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def prediction_cost(
    models: Mapping[str, Mapping[str, Any]], used: Sequence[str], *, views: int, passes: float
) -> dict[str, Any]:
    """Return what cost.json says.

    Parameters
    ----------
    models
        Member to what its model.json says: ``architecture``, ``num_parameters``, ``macs`` (multiply-adds of a forward pass
        over one stored image), ``lr`` (the peak learning rate) and ``best_epoch``; the last four may be missing.
    used
        Members of the exported predictor.
    views
        Number of its views.
    passes
        Forward passes that they cost a network, in those over one stored image.

    Returns
    -------
    dict
        ``members``: each one's ``architecture``, ``parameters``, ``macs``, ``lr``; ``predictor``: ``networks``, ``views``,
        ``forward_passes`` of a prediction, its ``macs``, and the ``parameters`` of its networks; None for what is not known.

    Examples
    --------
    >>> model = {"architecture": {"name": "resnet"}, "num_parameters": 1000, "macs": 5000, "lr": 0.1}
    >>> prediction_cost({"a": model, "b": model}, ["a", "b"], views=2, passes=2.0)["predictor"]
    {'networks': 2, 'views': 2, 'forward_passes': 4.0, 'macs': 20000.0, 'parameters': 2000}
    """
    keys = {"parameters": "num_parameters", "macs": "macs", "lr": "lr", "best_epoch": "best_epoch"}
    members = {
        name: {"architecture": model["architecture"]["name"], **{key: model.get(own) for key, own in keys.items()}}
        for name, model in models.items()
    }
    macs = [members[name]["macs"] for name in used]
    parameters = [members[name]["parameters"] for name in used]
    return {
        "members": members,
        "predictor": {
            "networks": len(used),
            "views": views,
            "forward_passes": round(len(used) * passes, 6),
            "macs": None if None in macs else passes * sum(macs),
            "parameters": None if None in parameters else sum(parameters),
        },
    }
