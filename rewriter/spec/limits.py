"""What a plan may cost at most."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A part of a spec: no other keys, no conversions, never changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


Count = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Scalar = str | int | float | bool | None
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _amount(value: str, units: Mapping[str, float], expected: str) -> float:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z%]{1,3})", value)
    if not found or found[2].lower() not in units:
        raise ValueError(f"expected {expected}")
    return float(found[1]) * units[found[2].lower()]


def _bytes(value: int | str | None) -> float | None:
    return _amount(value, _UNITS, "") if isinstance(value, str) else value


def _quantity(units: Mapping[str, float], expected: str) -> Any:
    """The type of a text that `_amount` reads."""

    def check(value: str) -> str:
        _amount(value, units, expected)
        return value

    return Annotated[str, AfterValidator(check)]


Parameters = Annotated[int, Field(ge=0)] | _quantity({"%": 1}, "a count, or a share of all parameters such as 0.5%")


class Limits(Strict):
    """What a plan may cost at most; one that exceeds a limit is refused."""

    trainable_parameters: Parameters | None = Field(
        None, description="tuned parameters, new heads apart: a count, or a share of all parameters such as 0.5%"
    )
    head_parameters: Parameters | None = Field(
        None, description="parameters of new heads: a count, or a share of all parameters"
    )
    activation_memory: Annotated[int, Field(ge=0)] | _quantity(_UNITS, "bytes, or a size such as 8 GiB") | None = Field(
        None, description="bytes that a batch's forward saves for its backward, or a size such as 8 GiB"
    )
    weight_memory: Annotated[int, Field(ge=0)] | _quantity(_UNITS, "bytes, or a size such as 8 GiB") | None = Field(
        None,
        description="bytes of the base's weights on a device, or a size such as 8 GiB: what is more stays in the CPU's "
        "memory, the first layers' first",
    )
    overhead_flops: _quantity({"%": 1}, "a share such as 5%") | None = Field(
        None, description="a step's FLOPs beyond the frozen model's forward and input gradient, such as 5%"
    )

    def parameters(self, name: str, total: int) -> float | None:
        """The limit `name` as a count, of a model of `total` parameters."""
        value = getattr(self, name)
        return _amount(value, {"%": 0.01 * total}, "") if isinstance(value, str) else value

    @property
    def activations(self) -> float | None:
        """`activation_memory` in bytes."""
        return _bytes(self.activation_memory)

    @property
    def weights(self) -> float | None:
        """`weight_memory` in bytes."""
        return _bytes(self.weight_memory)

    @property
    def overhead(self) -> float | None:
        """`overhead_flops` as a fraction."""
        return None if self.overhead_flops is None else _amount(self.overhead_flops, {"%": 0.01}, "")

    @property
    def of_a_step(self) -> bool:
        """Whether a limit is of a whole training step, which has to be traced."""
        return self.activation_memory is not None or self.overhead_flops is not None
