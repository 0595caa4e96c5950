"""Frozen, validated configuration classes whose errors are sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from fewbit.errors import ConfigError, nearest, shown

T = TypeVar("T")
MOST_PROBLEMS = 5


@dataclass_transform(frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """A frozen pydantic dataclass that raises ConfigError: unknown fields name the nearest known one.

    A class may have a static method `translate(fields) -> fields`, which turns other libraries' names for its fields
    and their values into its own before anything is checked.
    """
    translate: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(cls, "translate", None)

    def prepare(given: dict[str, Any]) -> dict[str, Any]:
        given = given if translate is None else translate(given)
        for name in given:
            if name not in fields:
                raise ConfigError(f"{cls.__name__} has no field {shown(name)}{nearest(name, fields)}")
        return given

    def prepare_nested(_: type[T], given: Any) -> Any:  # a table inside another config does not pass __init__
        return prepare(dict(given)) if isinstance(given, Mapping) else given

    before: Any = model_validator(mode="before")
    cls._prepare_nested = before(classmethod(prepare_nested))  # type: ignore[attr-defined]
    made: Any = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    validate: Callable[..., None] = made.__init__
    fields = [field.name for field in dataclasses.fields(made)]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (it is the class's __init__)
        kwargs = prepare(kwargs)
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(_sentence(cls.__name__, error)) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def _sentence(name: str, error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        reason = detail["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in detail["loc"])
        given = f" (got {shown(detail['input'])})" if where else ""
        problems.append(f"{name}.{where}: {reason}{given}" if where else f"{name}: {reason}")
    more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    return "; ".join(problems[:MOST_PROBLEMS]) + more
