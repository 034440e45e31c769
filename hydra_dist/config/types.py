"""What every section of the configuration is made of: the strict base and the kinds of numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def parse_count(value: Any) -> Any:
    """Read a count of tokens as people write it: ``64K`` is 65,536 and ``1M`` is 1,048,576; anything else passes."""
    if isinstance(value, str) and value[-1:].upper() in UNITS and value[:-1].isdigit():
        return int(value[:-1]) * UNITS[value[-1].upper()]
    return value


Tokens = Annotated[int, BeforeValidator(parse_count), Field(gt=0, lt=2**48)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict and frozen: a number in quotes or an unknown key is a mistake, not a guess."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
