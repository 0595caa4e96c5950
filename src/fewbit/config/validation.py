"""Frozen, validated configuration classes; errors are ConfigErrors of one sentence."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from fewbit.errors import ConfigError, nearest, shown

T = TypeVar("T")
MOST_PROBLEMS = 5


@dataclass_transform(frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """A frozen pydantic dataclass that raises ConfigError: unknown fields name the nearest known one.

    A class may have a static method `translate(fields) -> fields`, which turns other libraries' names for its fields
    and their values into its own before anything is checked, and `also_known`: names to suggest besides its fields.
    """
    translate: Callable[[dict[str, Any]], dict[str, Any]] = getattr(cls, "translate", dict)

    def prepared(given: Mapping[str, Any]) -> dict[str, Any]:
        fields = translate(dict(given))
        known = [field.name for field in dataclasses.fields(made)]
        for name in fields:
            if name not in known:
                suggested = [*known, *getattr(cls, "also_known", ())]
                raise ConfigError(f"{cls.__name__} has no field {shown(name)}{nearest(name, suggested)}")
        return fields

    def validate(_: type[T], given: Any, check: Callable[[Any], Any]) -> Any:
        if isinstance(given, Mapping):  # a table inside another config, whose error names the place
            return check(prepared(given))
        if not isinstance(given, ArgsKwargs):
            return check(given)
        fields = prepared(given.kwargs or {})
        try:
            return check(ArgsKwargs(given.args, fields))
        except ValidationError as error:
            raise ConfigError(_sentence(cls.__name__, error)) from None

    wrap: Any = model_validator(mode="wrap")
    cls._validate = wrap(classmethod(validate))  # type: ignore[attr-defined]
    made: Any = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    return made  # type: ignore[no-any-return]


def table(value: Any, what: str) -> dict[str, Any]:
    """A table by names; classes stand for their names."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be a table of fields, not {shown(value)}")
    found = {key.__name__ if isinstance(key, type) else key: item for key, item in value.items()}
    for key in found:
        if not isinstance(key, str):
            raise ConfigError(f"{what} has no field {shown(key)}: names are text")
    return found


def _sentence(name: str, error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        reason = "must be a table of fields" if detail["type"] == "dataclass_type" else detail["msg"]
        where = ".".join(str(part) for part in detail["loc"])
        given = f" (got {shown(detail['input'])})" if where else ""
        problems.append(f"{name}.{where}: {reason}{given}" if where else f"{name}: {reason}")
    more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    return "; ".join(problems[:MOST_PROBLEMS]) + more
