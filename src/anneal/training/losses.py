"""What is minimised: sums over the samples of a microbatch, of logits and hard or soft targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the sum of ``-sum_k w_k t_k log p_k`` with ``p`` the softmax of the logits: torch's own.

    Parameters
    ----------
    logits
        Floating point (N, K).
    targets
        Classes, int64 (N,), or floating point (N, K), each row a distribution, as mixing makes them.
    class_weights
        ``w``, floating point (K,); None is 1 for each. A sum, so a sample weighs the same whatever its neighbours.
    label_smoothing
        ``e`` in [0, 1): targets become ``(1 - e) t + e / K`` (Szegedy et al. 2016).

    Examples
    --------
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item() == float(torch.tensor(4.0).log())
    True
    """
    return F.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing, reduction="sum")


def focal(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Return the sum of ``-sum_k w_k t_k (1 - p_k)^gamma log p_k``, Lin et al. 2017 for any distribution as a target.

    Parameters
    ----------
    logits, targets, class_weights, label_smoothing
        As for `cross_entropy`; targets are smoothed first. The weights are the paper's alpha.
    gamma
        At least 0, at which it is `cross_entropy` itself; the larger, the less a sample counts that is already right.

    Examples
    --------
    Right with probability 1/4, so (3/4)^2 of the cross entropy:

    >>> logits, label = torch.zeros(1, 4), torch.tensor([2])
    >>> round((focal(logits, label) / cross_entropy(logits, label)).item(), 6)
    0.5625
    """
    if gamma == 0:
        return cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing)
    log_p = torch.log_softmax(_wide(logits), 1)
    # 1 - p without cancellation; the floor keeps the gradient finite where p is 1 in floating point and gamma below 1.
    other = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    terms = _smoothed(_distribution(targets, log_p), label_smoothing) * other.pow(gamma) * log_p
    return -(terms if class_weights is None else terms * class_weights.to(terms.dtype)).sum()


def binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the sum over samples and classes of ``-t_k log s_k - (1 - t_k) log(1 - s_k)``, one sigmoid a class.

    A sum over classes and not a mean (Wightman et al. 2021 take the mean): the gradient by a logit is then ``s_k - t_k``,
    as large as the ``p_k - t_k`` of cross entropy whatever the number of classes, so that rates, penalties and clips that
    suit the one suit the other.

    Parameters
    ----------
    logits, targets
        As for `cross_entropy`.
    class_weights
        ``w``: all terms of a sample are multiplied by ``sum_k w_k t_k`` of its target as it was before smoothing, as if
        its class came up so much more often. None is 1 for each.
    label_smoothing
        As for `cross_entropy`: the targets of the sigmoids are ``1 - e + e / K`` and ``e / K``.

    Examples
    --------
    >>> label = torch.tensor([2])
    >>> (binary_cross_entropy(torch.zeros(1, 4), label) / torch.tensor(2.0).log()).item()
    4.0
    """
    logits = _wide(logits)
    distribution = _distribution(targets, logits)
    smoothed = _smoothed(distribution, label_smoothing)
    terms = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    if class_weights is not None:
        terms = terms * (distribution @ class_weights.to(terms.dtype)).unsqueeze(1)
    return terms.sum()


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "binary_cross_entropy": binary_cross_entropy,
}
"""``loss.name`` to a function of logits, targets and class weights; of its own it has the arguments of the block."""


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in at least 32 bits, as torch does for its own losses under mixed precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _distribution(targets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (F.one_hot(targets, like.shape[1]) if targets.ndim == 1 else targets).to(like.dtype)


def _smoothed(targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return targets * (1 - label_smoothing) + label_smoothing / targets.shape[1] if label_smoothing else targets
