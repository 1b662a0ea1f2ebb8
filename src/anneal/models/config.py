"""The ``model`` and ``init`` sections of params.yaml; imports no torch, so that checking params is quick."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from anneal.models.custom import PATTERN
from anneal.params import Length, Strict

Activation = Literal[
    "auto",
    "ReLU",
    "LeakyReLU",
    "PReLU",
    "ReLU6",
    "ELU",
    "CELU",
    "SELU",
    "GELU",
    "SiLU",
    "Mish",
    "Softplus",
    "Hardswish",
    "Tanh",
    "Hardtanh",
    "Softsign",
    "Sigmoid",
    "Hardsigmoid",
    "LogSigmoid",
    "Tanhshrink",
    "Softshrink",
    "Hardshrink",
]
Stem = Literal["small", "large"]
Block = Literal["basic", "bottleneck", "preactivation"]
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=8)]
Depths = Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=8)]
Epsilon = Annotated[float, Field(gt=0)]

OWN: dict[str, tuple[str, str]] = {"convnext": ("GELU", "layer"), "airbench": ("GELU", "batch")}
"""Activation and norm that ``auto`` stands for, by architecture; ReLU and batch in all others."""

RESIDUAL = ("resnet", "preact_resnet", "wide_resnet", "convnext")
"""Architectures with residual branches."""


class RecalibrateConfig(Strict):
    """``model.norm.batch.recalibrate``: running statistics as a plain mean over training batches (Wu & Johnson 2021)."""

    when: Literal["averaging", "always", "never"]
    images: Annotated[int, Field(ge=2)]


class BatchNormConfig(Strict):
    """``model.norm.batch``: arguments of torch.nn.BatchNorm2d, and what becomes of its statistics."""

    momentum: Annotated[float, Field(gt=0, le=1)]
    eps: Epsilon
    affine: bool = True
    ghost: Annotated[int, Field(ge=2)] | None = None
    sync: bool
    frozen: bool
    recalibrate: RecalibrateConfig


class GroupNormConfig(Strict):
    """``model.norm.group``: arguments of torch.nn.GroupNorm."""

    groups: Annotated[int, Field(ge=1)]
    eps: Epsilon
    affine: bool = True


class LayerNormConfig(Strict):
    """``model.norm.layer`` and ``model.norm.instance``: arguments of torch.nn.LayerNorm and torch.nn.InstanceNorm2d."""

    eps: Epsilon
    affine: bool = True


class NormConfig(Strict):
    """``model.norm``: the normalisation layer, before or after the activation."""

    name: Literal["auto", "batch", "group", "layer", "instance", "none"]
    position: Literal["before", "after"]
    batch: BatchNormConfig
    group: GroupNormConfig
    layer: LayerNormConfig
    instance: LayerNormConfig

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the layer, plain values."""
        block = getattr(self, self.name, None)
        return {} if block is None else block.model_dump(exclude={"recalibrate"})


class MLPConfig(Strict):
    """``model.mlp``: widths of the hidden layers."""

    hidden: Annotated[list[Width], Field(max_length=20)]


class ConvNetConfig(Strict):
    """``model.convnet``: VGG-like; each stage is ``depth`` 3x3 convolutions and a 2x2 max-pooling."""

    widths: Widths
    depth: Annotated[int, Field(ge=1, le=8)]


class StagesConfig(Strict):
    """Stages of residual blocks; each stage after the first halves the resolution."""

    widths: Widths
    depths: Depths

    @model_validator(mode="after")
    def _a_depth_for_each_width(self) -> Self:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"depths: found {len(self.depths)} stages, allowed: {len(self.widths)}, one for each of widths"
            )
        return self


class ResNetConfig(StagesConfig):
    """``model.resnet``: He et al. 2016a, and with preactivation blocks 2016b."""

    stem: Stem
    block: Block = "basic"


class PreactResNetConfig(StagesConfig):
    """``model.preact_resnet``: a resnet of preactivation blocks (He et al. 2016b)."""

    stem: Stem


class WideResNetConfig(Strict):
    """``model.wide_resnet``: Zagoruyko & Komodakis 2016."""

    depth: Annotated[int, Field(ge=10, le=1000)]
    width: Annotated[int, Field(ge=1, le=64)]
    block_dropout: Annotated[float, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def _three_stages_of_whole_blocks(self) -> WideResNetConfig:
        if self.depth % 6 != 4:
            near = max(10, 6 * round((self.depth - 4) / 6) + 4)
            raise ValueError(f"depth: found {self.depth}, allowed: 6 n + 4 for n blocks a stage; nearest {near}")
        return self


class ConvNeXtConfig(StagesConfig):
    """``model.convnext``: Liu et al. 2022."""

    stem: Annotated[int, Field(ge=1, le=32)]
    kernel: Annotated[int, Field(ge=1, le=31, json_schema_extra={"allowed": "an odd number from 1 to 31"})]
    layer_scale: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _a_kernel_has_a_middle(self) -> ConvNeXtConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: found {self.kernel}, allowed: an odd number; nearest {self.kernel - 1}")
        return self


class AirbenchConfig(Strict):
    """``model.airbench``: Jordan 2024."""

    widths: Widths
    scale: Annotated[float, Field(gt=0)]


ARCHITECTURES = ("resnet", "preact_resnet", "wide_resnet", "convnext", "airbench", "convnet", "mlp")
ModelName = (
    Literal["resnet", "preact_resnet", "wide_resnet", "convnext", "airbench", "convnet", "mlp"]
    | Annotated[str, Field(pattern=PATTERN)]
)


class StartFromConfig(Strict):
    """``model.start_from``: a trained member whose weights a run starts from, pinned by their hash."""

    path: Annotated[str, Field(min_length=1)] | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    freeze: Length
    unfreeze: Literal["together", "gradually"]


class ModelConfig(Strict):
    """Section ``model``: the architecture, and one block of arguments for each choice.

    ``auto`` of `activation` and of the norm's name is replaced by what it stands for.
    """

    name: Annotated[
        ModelName, Field(json_schema_extra={"allowed": f"{' | '.join(ARCHITECTURES)} | package.module:callable"})
    ]
    activation: Activation
    norm: NormConfig
    resnet: ResNetConfig
    preact_resnet: PreactResNetConfig
    wide_resnet: WideResNetConfig
    convnext: ConvNeXtConfig
    airbench: AirbenchConfig
    convnet: ConvNetConfig
    mlp: MLPConfig
    custom: dict[str, JsonValue]
    start_from: StartFromConfig

    @model_validator(mode="before")
    @classmethod
    def _what_auto_stands_for(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        activation, norm = OWN.get(str(values.get("name")), ("ReLU", "batch"))
        resolved = dict(values)
        if resolved.get("activation") == "auto":
            resolved["activation"] = activation
        of_norm = resolved.get("norm")
        if isinstance(of_norm, Mapping) and of_norm.get("name") == "auto":
            resolved["norm"] = {**of_norm, "name": norm}
        return resolved

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the architecture, plain values."""
        return dict(self.custom) if is_custom(self.name) else getattr(self, self.name).model_dump()


def is_custom(name: str) -> bool:
    """Return whether ``model.name`` is an import path."""
    return ":" in name


Positive = Annotated[float, Field(gt=0)]
Gain = Positive | Annotated[Literal["auto"], Field(json_schema_extra={"allowed": "auto (by the activation)"})]


class ConstantConfig(Strict):
    """``init.constant``: every weight alike."""

    value: float


class NormalConfig(Strict):
    """``init.normal`` and ``init.truncated_normal``: a standard deviation that knows nothing of the layer."""

    std: Positive


class UniformConfig(Strict):
    """``init.uniform``: between -limit and limit."""

    limit: Positive


class GainConfig(Strict):
    """``init.xavier_normal``, ``init.xavier_uniform`` (Glorot & Bengio 2010) and ``init.orthogonal`` (Saxe et al. 2014)."""

    gain: Gain


class KaimingConfig(Strict):
    """``init.kaiming_normal`` and ``init.kaiming_uniform``: He et al. 2015."""

    mode: Literal["fan_in", "fan_out"]


class LSUVConfig(Strict):
    """``init.lsuv``: Mishkin & Matas 2016."""

    tolerance: Annotated[float, Field(gt=0, lt=1)]
    max_iterations: Annotated[int, Field(ge=1, le=100)]


class WhiteningConfig(Strict):
    """``init.whitening``: of the first convolution, where ``init.whiten_first`` is true."""

    eps: Positive


class InitConfig(Strict):
    """Section ``init``: the law of the initial weights, and one block of arguments for each choice that takes any."""

    name: Literal[
        "zeros",
        "constant",
        "normal",
        "truncated_normal",
        "uniform",
        "xavier_normal",
        "xavier_uniform",
        "kaiming_normal",
        "kaiming_uniform",
        "orthogonal",
        "lsuv",
    ]
    zero_last: bool
    whiten_first: bool
    constant: ConstantConfig
    normal: NormalConfig
    truncated_normal: NormalConfig
    uniform: UniformConfig
    xavier_normal: GainConfig
    xavier_uniform: GainConfig
    kaiming_normal: KaimingConfig
    kaiming_uniform: KaimingConfig
    orthogonal: GainConfig
    lsuv: LSUVConfig
    whitening: WhiteningConfig

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the law, plain values."""
        block = getattr(self, self.name, None)
        return {} if block is None else block.model_dump()


def hidden_weights(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Return how many weight layers stand between the first and the head; None where every such network has some.

    >>> hidden_weights("mlp", {"hidden": [256, 128]}), hidden_weights("resnet", {})
    (1, None)
    """
    if name == "mlp":
        return max(0, len(arguments["hidden"]) - 1)
    return len(arguments["widths"]) * arguments["depth"] - 1 if name == "convnet" else None


def halvings(name: str, arguments: Mapping[str, Any]) -> int:
    """Return how often a network halves the resolution of its input, from the block of its ``name``.

    >>> halvings("resnet", {"widths": [64, 128], "depths": [2, 2], "stem": "large"})
    3
    """
    if name == "mlp":
        return 0
    if name == "wide_resnet":
        return 2
    stages = len(arguments["widths"])
    if name in ("convnet", "airbench"):
        return stages
    return stages - 1 + (2 if arguments.get("stem") == "large" else 0)


def smallest_image(name: str, arguments: Mapping[str, Any]) -> int:
    """Return the side in pixels of the smallest image that a network takes, from the block of its ``name``.

    >>> smallest_image("airbench", {"widths": [64, 256, 256]})
    9
    """
    factor = 2 ** halvings(name, arguments)
    if name == "convnext":
        return factor * int(arguments["stem"])
    return factor + (name == "airbench")


def _last_map(name: str, arguments: Mapping[str, Any], side: int) -> int:
    """Return the side in pixels of the smallest map that a norm layer sees; 1 where it is a vector."""
    times = halvings(name, arguments)
    if name in ("mlp", "convnext"):
        return 1
    if name == "convnet":
        return side >> (times - 1)
    return (side - 1) >> times if name == "airbench" else -(-side >> times)


def _normed_channels(name: str, arguments: Mapping[str, Any]) -> list[int]:
    """Return the channels that norm layers see, those at the smallest map last."""
    if name == "mlp":
        return list(arguments["hidden"])
    if name == "wide_resnet":
        return [16, *(16 * 2**stage * arguments["width"] for stage in range(3))]
    return list(arguments["widths"])


def conflicts(
    name: str,
    *,
    arguments: Mapping[str, Any],
    height: int,
    width: int,
    normalize: str = "scale",
    norm: str = "batch",
    norm_position: str = "before",
    norm_arguments: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    spatial_dropout: float = 0.0,
    microbatch: int | None = None,
    whiten_first: bool = False,
    zero_last: bool = False,
) -> list[str]:
    """Say which settings cannot work together, one line each; an empty list where all do.

    Parameters
    ----------
    name, arguments
        ``model.name`` and the block of that name.
    height, width
        Pixels of the stored images.
    normalize
        ``preprocess.normalize``.
    norm, norm_position, norm_arguments
        ``model.norm.name``, ``model.norm.position`` and the block of that name; arguments that it lacks are not checked.
    dropout, stochastic_depth, spatial_dropout
        Of ``regularization``.
    microbatch
        ``batch.microbatch``; None leaves it unchecked.
    whiten_first, zero_last
        Of ``init``.

    Examples
    --------
    >>> for fault in conflicts("mlp", arguments={"hidden": []}, height=8, width=8, stochastic_depth=0.1):
    ...     print(fault)
    regularization.stochastic_depth: found 0.1 with model.name mlp, allowed: 0, or a model.name with residual branches to drop: resnet | preact_resnet | wide_resnet | convnext
    """
    if is_custom(name):
        rates = {"dropout": dropout, "stochastic_depth": stochastic_depth, "spatial_dropout": spatial_dropout}
        return _custom_conflicts(name, normalize, rates, whiten_first, zero_last)
    given = norm_arguments or {}
    faults: list[str] = []
    if stochastic_depth and name not in RESIDUAL:
        faults.append(
            f"regularization.stochastic_depth: found {stochastic_depth:g} with model.name {name}, allowed: 0, or a "
            f"model.name with residual branches to drop: {' | '.join(RESIDUAL)}"
        )
    if spatial_dropout and name == "mlp":
        faults.append(
            f"regularization.spatial_dropout: found {spatial_dropout:g} with model.name mlp, which has no channels to drop "
            f"as a whole, allowed: 0, or regularization.dropout"
        )
    if norm_position == "after" and name == "convnext":
        faults.append(
            "model.norm.position: found after with model.name convnext, whose norms stand beside no activation, "
            "allowed: before"
        )
    if (
        zero_last
        and norm != "none"
        and not given.get("affine", True)
        and arguments.get("block") in ("basic", "bottleneck")
    ):
        faults.append(
            f"init.zero_last: found true with model.norm.{norm}.affine false, which leaves the norm that ends each branch "
            f"without a scale, allowed: false, or model.resnet.block: preactivation"
        )
    if whiten_first and name == "mlp":
        faults.append(
            "init.whiten_first: found true with model.name mlp, which has no convolution whose patches could be whitened, "
            "allowed: false, or preprocess.normalize: zca, which whitens whole images"
        )
    if normalize == "pca" and name != "mlp":
        faults.append(
            f"preprocess.normalize: found pca with model.name {name}, which needs images and not components, "
            f"allowed: zca, which whitens and stays an image, or model.name: mlp"
        )
    too_small = _size_conflicts(name, arguments, height, width)
    return faults + (
        too_small or _norm_conflicts(name, arguments, height, width, norm, norm_position, given, microbatch)
    )


def _size_conflicts(name: str, arguments: Mapping[str, Any], height: int, width: int) -> list[str]:
    """Say whether the images are too small for the network."""
    side, least = min(height, width), smallest_image(name, arguments)
    if side >= least:
        return []
    images, larger = f"for images of {height}x{width} pixels", f"preprocess.size >= {least}"
    times = halvings(name, arguments)
    if "widths" not in arguments:
        return [f"model.name: found {name}, which halves the resolution {times} times, {images}, allowed: {larger}"]
    if arguments.get("stem") == "large" and side < 4:
        return [f"model.{name}.stem: found large, which divides the resolution by 4, {images}, allowed: small"]
    if name == "convnext" and side < arguments["stem"]:
        return [f"model.convnext.stem: found patches of {arguments['stem']} pixels, {images}, allowed: at most {side}"]
    stages = len(arguments["widths"])
    fitting = [n for n in range(1, stages) if smallest_image(name, {**arguments, "widths": [1] * n}) <= side]
    fewer = f"at most {max(fitting)} stages, or " if fitting else ""
    return [
        f"model.{name}.widths: found {stages} stages, which halve the resolution {times} times, {images}, "
        f"allowed: {fewer}{larger}"
    ]


def _norm_conflicts(
    name: str,
    arguments: Mapping[str, Any],
    height: int,
    width: int,
    norm: str,
    norm_position: str,
    given: Mapping[str, Any],
    microbatch: int | None,
) -> list[str]:
    """Say where a norm layer cannot be built, or would see a single value at a time."""
    channels = _normed_channels(name, arguments)
    area = _last_map(name, arguments, height) * _last_map(name, arguments, width)
    chosen = [key for key in ("frozen", "sync", "ghost") if given.get(key)] if norm == "batch" else []
    if len(chosen) > 1:
        reasons = {
            "frozen": "which normalises by kept statistics and not by samples",
            "sync": "which normalises by the samples of all devices together",
        }
        off = "null" if chosen[1] == "ghost" else "false"
        return [
            f"model.norm.batch.{chosen[1]}: found {str(given[chosen[1]]).lower()} with model.norm.batch.{chosen[0]}, "
            f"{reasons[chosen[0]]}, allowed: {off}, or model.norm.batch.{chosen[0]}: false"
        ]
    if norm == "batch" and microbatch is not None and not given.get("frozen"):
        ghost = given.get("ghost")
        if microbatch == 1 and channels:
            return [
                "batch.microbatch: found 1, where batch normalisation sees a single image, allowed: 2 or more, "
                "or model.norm.name: group | layer | none"
            ]
        if ghost is not None and microbatch % ghost:
            found = (
                f"model.norm.batch.ghost: found {ghost}, allowed: a number that divides batch.microbatch {microbatch}"
            )
            return [f"{found}; nearest {_near(ghost, microbatch, least=2)}" if microbatch > 1 else f"{found}; null"]
    groups = given.get("groups")
    if norm == "group" and groups is not None and any(count % groups for count in channels):
        return [
            f"model.norm.group.groups: found {groups}, allowed: a number that divides the channels of every layer "
            f"({', '.join(map(str, dict.fromkeys(channels)))}); nearest {_near(groups, gcd(*channels))}"
        ]
    by_channel = norm == "instance" or (norm == "group" and groups == channels[-1])
    if by_channel and norm_position == "after" and name in RESIDUAL:
        return [
            f"model.norm.position: found after with model.norm.name {norm}, which leaves each channel with a mean of 0 over "
            f"the image, and model.name {name} ends in just that mean, allowed: before"
        ]
    # Where it is not known, maps are of more than one pixel.
    for index, count in enumerate(channels):
        pixels = area if name == "mlp" or index == len(channels) - 1 else 2
        together = {"layer": count, "instance": pixels, "group": pixels * count // (groups or 1)}.get(norm, 2)
        if together == 1:
            found = f"group.groups: found {groups}" if norm == "group" else f"name: found {norm}"
            other = "fewer, or another model.norm.name" if norm == "group" else "another"
            return [
                f"model.norm.{found}, which normalises each of {count} channels of a single pixel alone and "
                f"so makes every value 0 in model.{name}, allowed: {other}"
            ]
    return []


def _near(number: int, whole: int, *, least: int = 1) -> int:
    """Return the divisor of ``whole`` nearest to ``number``."""
    return min((n for n in range(least, whole + 1) if whole % n == 0), key=lambda n: abs(n - number))


def _custom_conflicts(
    name: str, normalize: str, rates: Mapping[str, float], whiten_first: bool, zero_last: bool
) -> list[str]:
    """Say which settings a network by import path cannot follow, since nothing is known of its layers."""
    faults = [
        f"regularization.{key}: found {value:g} with model.name {name}, allowed: 0; give the network its own in model.custom"
        for key, value in rates.items()
        if value
    ]
    faults += [
        f"init.{key}: found true with model.name {name}, which keeps its own initial weights, allowed: false"
        for key, value in (("whiten_first", whiten_first), ("zero_last", zero_last))
        if value
    ]
    if normalize == "pca":
        faults.append(
            f"preprocess.normalize: found pca with model.name {name}, which gets images and not components, allowed: zca"
        )
    return faults
