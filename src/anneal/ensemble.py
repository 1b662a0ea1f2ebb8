"""Members' predictions into one.

Predictions travel as log-probabilities, float64, so that nothing underflows and a mean of logits needs no logits:
they differ from log-probabilities by a constant an image, which the softmax takes out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints

from anneal.params import MEMBER_SECTIONS, Strict

MemberName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


def _member_schema(schema: dict[str, Any]) -> None:
    """Name the sections that a member may override, so that a mistyped one is a fault."""
    option = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"type": "integer"} if name == "seed" else {"type": "object"} for name in MEMBER_SECTIONS},
    }
    members = schema["properties"]["members"]
    members["additionalProperties"] = {"anyOf": [option, {"type": "null"}]}
    members["propertyNames"] = {"pattern": "^[A-Za-z0-9_-]+$"}
    members.pop("patternProperties", None)


class EnsembleConfig(Strict):
    """Section ``ensemble``: who trains, and how their predictions combine."""

    model_config = {"json_schema_extra": _member_schema}

    members: Annotated[dict[MemberName, dict[str, Any] | None], Field(min_length=1)]
    combine: Literal["probability_mean", "logit_mean", "vote"]


Floats = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Return logits (..., K) as log-probabilities, float64.

    >>> np.exp(log_softmax(np.array([0.0, 0.0])))
    array([0.5, 0.5])
    """
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def probability_mean(log_probabilities: Floats) -> Floats:
    """Return the mean of the probabilities over the first axis (Lakshminarayanan et al. 2017).

    Parameters
    ----------
    log_probabilities
        float64 (M, N, K): of M members, or views, on N images.

    Returns
    -------
    ndarray
        Log-probabilities, float64 (N, K); so in every function here.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return log_softmax(np.logaddexp.reduce(log_probabilities, axis=0))


def logit_mean(log_probabilities: Floats) -> Floats:
    """Return the softmax of the mean logits, which is the normalised geometric mean of the probabilities.

    Sharper than `probability_mean`; one member that is sure that it is not a class can veto it.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    return log_softmax(log_probabilities.mean(axis=0))


def vote(log_probabilities: Floats) -> Floats:
    """Return the shares of the members' votes, the members' mean probability counting as one more vote.

    The extra vote breaks ties and cannot turn a majority, and it keeps the likelihood of a class without votes finite.
    One member alone is returned as it is.
    """
    if len(log_probabilities) == 1:
        return log_probabilities[0]
    classes = log_probabilities.shape[-1]
    votes = (log_probabilities.argmax(axis=-1)[..., None] == np.arange(classes)).sum(axis=0)
    with np.errstate(divide="ignore"):
        return log_softmax(np.logaddexp(np.log(votes), probability_mean(log_probabilities)))


COMBINE: dict[str, Callable[[Floats], Floats]] = {
    "probability_mean": probability_mean,
    "logit_mean": logit_mean,
    "vote": vote,
}
"""``ensemble.combine``; the first two also average views."""
