"""Members' predictions into one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
