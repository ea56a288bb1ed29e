"""Configurations to JSON and back. A layer's configuration is written with its name in the registry."""

import dataclasses
import types
import typing
from typing import Any

from phyla.models.config import LayerConfig
from phyla.models.errors import UserError, choose
from phyla.models.registry import LAYERS


def to_json(config: Any) -> Any:
    """A frozen dataclass tree as plain dictionaries, lists, strings and numbers."""
    if dataclasses.is_dataclass(config):
        fields = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        if isinstance(config, LayerConfig):
            name = next(name for name, layer in LAYERS.items() if layer is type(config))
            return {"layer": name, **fields}
        return fields
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(kind: Any, data: Any, where: str = "config") -> Any:
    """The inverse of `to_json` for a value of type `kind`.

    A field that is not there did not exist when it was written, and has its default. Raises UserError for an unknown
    field, or for one that is missing and has no default.
    """
    if isinstance(kind, types.UnionType):  # X | None
        if data is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(from_json(item, value, f"{where}.{i}") for i, value in enumerate(data))
    if not dataclasses.is_dataclass(kind):
        return data
    data = dict(data)
    if kind is LayerConfig:
        kind = LAYERS[choose(f"layer at {where}", data.pop("layer"), LAYERS)]
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data:
        choose(f"field in {where}", name, fields)
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in data:
            raise UserError(f"{where} has no field '{name}'")
    make: Any = kind
    return make(**{name: from_json(hints[name], value, f"{where}.{name}") for name, value in data.items()})
