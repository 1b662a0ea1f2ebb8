"""The techniques of a recipe: which are on, and what in params.yaml switches each off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anneal import params
from anneal.params import ParamsError, UserError, nearest

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Technique:
    """A technique that is on.

    Parameters
    ----------
    name
        As on the command line.
    title
        In words.
    off
        Nested params that switch it off; nothing for one that needs no training: its figures are of the same networks.
    """

    name: str
    title: str
    off: Mapping[str, Any]

    @property
    def trains(self) -> bool:
        """Whether networks are trained without it."""
        return bool(self.off)


# ---- each technique: its overrides where it is on, None where it is off ----------------------------------------------


def augmentation(values: Values) -> dict[str, Any] | None:
    """Set ``augment.policy`` to none."""
    return {"augment": {"policy": "none"}} if values["augment"]["policy"] not in ("none", []) else None


def balanced_copies(values: Values) -> dict[str, Any] | None:
    """Set ``augment.copies.balance`` to false."""
    return {"augment": {"copies": {"balance": False}}} if values["augment"]["copies"]["balance"] else None


def input_normalization(values: Values) -> dict[str, Any] | None:
    """Set ``preprocess.normalize`` to scale: pixels from 0 to 1, without statistics of the training data."""
    return (
        {"preprocess": {"normalize": "scale"}} if values["preprocess"]["normalize"] not in ("none", "scale") else None
    )


BLIND = ("zeros", "constant", "normal", "truncated_normal", "uniform")
"""Laws of the first weights that know nothing of a layer's size."""


def initialization(values: Values) -> dict[str, Any] | None:
    """Set ``init.name`` to normal with a standard deviation of 0.01, whatever the layer's size."""
    if values["init"]["name"] in BLIND or values["model"]["start_from"]["path"] is not None:
        return None
    return {"init": {"name": "normal", "normal": {"std": 0.01}}}


def transfer(values: Values) -> dict[str, Any] | None:
    """Set ``model.start_from`` to nothing: trained from scratch, by the recipe's ``init``."""
    if values["model"]["start_from"]["path"] is None:
        return None
    return {"model": {"start_from": {"path": None, "sha256": None, "freeze": 0.0, "unfreeze": "together"}}}


def norm(values: Values) -> dict[str, Any] | None:
    """Set ``model.norm.name`` to none; a zero at the end of each residual branch, which norms bring, goes with it."""
    model = values["model"]
    if model["norm"]["name"] == "none" or ":" in model["name"]:
        return None
    found: dict[str, Any] = {"model": {"norm": {"name": "none"}}}
    return {**found, "init": {"zero_last": False}} if values["init"]["zero_last"] else found


def momentum(values: Values) -> dict[str, Any] | None:
    """Set the optimizer's momentum, or the first of its betas, to 0; the rate stays as it is."""
    name, block = _block(values)
    found = _without_momentum(block)
    if isinstance(block.get("rest"), Mapping) and (rest := _without_momentum(block["rest"])):
        found["rest"] = rest
    if not found:
        return None
    cycle = values["schedule"]["name"] == "one_cycle" and values["schedule"]["one_cycle"]["momentum"] is not None
    more = {"schedule": {"one_cycle": {"momentum": None}}} if cycle else {}
    return {"optimizer": {name: found}, **more}


def _without_momentum(block: Mapping[str, Any]) -> dict[str, Any]:
    if block.get("momentum"):
        return {"momentum": 0.0, **({"nesterov": False} if block.get("nesterov") else {})}
    betas = block.get("betas")
    return {"betas": [0.0, *betas[1:]]} if isinstance(betas, list) and betas and betas[0] else {}


def nesterov(values: Values) -> dict[str, Any] | None:
    """Set the optimizer's ``nesterov`` to false."""
    name, block = _block(values)
    return {"optimizer": {name: {"nesterov": False}}} if block.get("nesterov") and block.get("momentum") else None


def weight_decay(values: Values) -> dict[str, Any] | None:
    """Set the optimizer's ``weight_decay`` to 0, that of ``rest`` too."""
    name, block = _block(values)
    found: dict[str, Any] = {"weight_decay": 0.0} if block.get("weight_decay") else {}
    if isinstance(block.get("rest"), Mapping) and block["rest"].get("weight_decay"):
        found["rest"] = {"weight_decay": 0.0}
    return {"optimizer": {name: found}} if found else None


def schedule(values: Values) -> dict[str, Any] | None:
    """Set ``schedule.name`` to constant; the warm-up stays."""
    return {"schedule": {"name": "constant"}} if values["schedule"]["name"] != "constant" else None


def warmup(values: Values) -> dict[str, Any] | None:
    """Set ``schedule.warmup.length`` to 0."""
    length = values["schedule"]["warmup"]["length"]
    number = float(length.split()[0]) if isinstance(length, str) else length
    return {"schedule": {"warmup": {"length": 0.0}}} if number else None


def layer_rates(values: Values) -> dict[str, Any] | None:
    """Set ``optimizer.lr_factors`` to 1."""
    off = dict.fromkeys(values["optimizer"]["lr_factors"], 1.0)
    return {"optimizer": {"lr_factors": off}} if values["optimizer"]["lr_factors"] != off else None


def mixing(name: str) -> Callable[[Values], dict[str, Any] | None]:
    """Set ``regularization.<name>.alpha`` to 0."""

    def off(values: Values) -> dict[str, Any] | None:
        mix = values["regularization"][name]
        return {"regularization": {name: {"alpha": 0.0}}} if mix["alpha"] and mix["probability"] else None

    return off


def switch(key: str, off: Any) -> Callable[[Values], dict[str, Any] | None]:
    """Return a technique that one key switches off."""
    *parents, leaf = key.split(".")

    def overrides(values: Values) -> dict[str, Any] | None:
        node: Any = values
        for name in parents:
            node = node.get(name, {}) if isinstance(node, Mapping) else {}
        if node.get(leaf, off) == off:
            return None
        nested: Any = off
        for name in reversed([*parents, leaf]):
            nested = {name: nested}
        return dict(nested)

    return overrides


def block_dropout(values: Values) -> dict[str, Any] | None:
    """Set ``model.wide_resnet.block_dropout`` to 0, where that is the model."""
    if values["model"]["name"] != "wide_resnet":
        return None
    return switch("model.wide_resnet.block_dropout", 0.0)(values)


def tta(values: Values) -> dict[str, Any] | None:
    """Take the image alone, of the same networks."""
    return {} if values["evaluate"]["tta"]["views"] != ["identity"] else None


def ensemble(values: Values) -> dict[str, Any] | None:
    """Take each of the same networks alone."""
    return {} if len(values["ensemble"]["members"]) > 1 else None


def _block(values: Values) -> tuple[str, Mapping[str, Any]]:
    name = values["optimizer"]["name"]
    return name, values["optimizer"].get(name) or {}


TECHNIQUES: dict[str, tuple[str, Callable[[Values], dict[str, Any] | None]]] = {
    "augmentation": ("augmentation", augmentation),
    "balanced_copies": ("copies of the smaller classes", balanced_copies),
    "input_normalization": ("input normalisation", input_normalization),
    "init": ("initialisation", initialization),
    "zero_last": ("zero at the end of branches", switch("init.zero_last", False)),
    "whiten_first": ("whitening first layer", switch("init.whiten_first", False)),
    "transfer": ("transfer learning", transfer),
    "norm": ("normalisation layers", norm),
    "momentum": ("momentum", momentum),
    "nesterov": ("Nesterov's momentum", nesterov),
    "sam": ("sharpness-aware steps", switch("optimizer.sam.rho", 0.0)),
    "layer_rates": ("rates by layer", layer_rates),
    "schedule": ("schedule", schedule),
    "warmup": ("warm-up", warmup),
    "batch_growth": ("growing batch", switch("batch.growth.at", [])),
    "balanced_sampling": ("balanced sampling", switch("batch.sampling", "shuffle")),
    "loss": ("loss", switch("loss.name", "cross_entropy")),
    "class_weights": ("class weights", switch("loss.class_weights", "none")),
    "weight_decay": ("weight decay", weight_decay),
    "l1": ("L1", switch("regularization.l1", 0.0)),
    "l2": ("L2", switch("regularization.l2", 0.0)),
    "max_norm": ("max-norm", switch("regularization.max_norm", None)),
    "label_smoothing": ("label smoothing", switch("regularization.label_smoothing", 0.0)),
    "dropout": ("dropout", switch("regularization.dropout", 0.0)),
    "spatial_dropout": ("spatial dropout", switch("regularization.spatial_dropout", 0.0)),
    "block_dropout": ("dropout in blocks", block_dropout),
    "stochastic_depth": ("stochastic depth", switch("regularization.stochastic_depth", 0.0)),
    "mixup": ("mixup", mixing("mixup")),
    "cutmix": ("cutmix", mixing("cutmix")),
    "input_noise": ("input noise", switch("regularization.input_noise", 0.0)),
    "gradient_noise": ("gradient noise", switch("regularization.gradient_noise.std", 0.0)),
    "gradient_clip": ("gradient clipping", switch("regularization.gradient_clip", None)),
    "gradient_clip_value": ("clipping by value", switch("regularization.gradient_clip_value", None)),
    "gradient_clip_adaptive": ("adaptive clipping", switch("regularization.gradient_clip_adaptive", None)),
    "averaging": ("averaging of weights", switch("averaging.name", "none")),
    "tta": ("TTA", tta),
    "ensemble": ("ensembling", ensemble),
}
"""Name to words and to what switches the technique off."""


def techniques_on(values: Values) -> dict[str, Technique]:
    """Return the techniques that a recipe has on, in the order of `TECHNIQUES`."""
    found = {}
    for name, (title, off) in TECHNIQUES.items():
        overrides = off(values)
        if overrides is not None:
            found[name] = Technique(name, title, overrides)
    return found


def chosen(found: Mapping[str, Technique], names: Iterable[str]) -> dict[str, Technique]:
    """Return the named ones of the techniques that are on; all where none is named.

    Raises
    ------
    UserError
        A name that is no technique's, or one that is off.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in TECHNIQUES:
            raise UserError(
                f"ablate: no technique {name!r}{nearest(name, TECHNIQUES) or '; there are ' + ', '.join(TECHNIQUES)}"
            )
        if name not in found:
            raise UserError(
                f"ablate: {name} is off in this recipe, so that there is nothing to remove; on are {', '.join(found)}"
            )
    return {name: found[name] for name in found if not names or name in names}


def without(values: Values, techniques: Iterable[Technique]) -> dict[str, Any]:
    """Return a recipe with these techniques off."""
    found = dict(values)
    for technique in techniques:
        found = params.merge(found, technique.off)
    return found


def possible(
    variants: Mapping[str, dict[str, Any]], check: Callable[[Mapping[str, Any]], object]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the variants that can be trained, each recipe once, and of each other one the first reason why not.

    Parameters
    ----------
    variants
        Label to whole params.
    check
        Raises a ParamsError for params that cannot be trained.
    """
    found: dict[str, dict[str, Any]] = {}
    refused = {}
    for label, values in variants.items():
        if twin := next((other for other, known in found.items() if known == values), None):
            refused[label] = f"the same recipe as {twin}"
            continue
        try:
            check(values)
            found[label] = values
        except ParamsError as error:
            refused[label] = error.faults[0]
    return found, refused
