"""Configs are dataclasses; overrides are dotted; an unknown key is an error that names the nearest one."""

import dataclasses
import difflib
import types
import typing
from typing import Any

import yaml

from mm.common.errors import UserError


def to_dict(value: Any) -> Any:
    """Dataclasses, dicts, lists and plain values as JSON would have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return [to_dict(v) for v in value] if isinstance(value, list | tuple) else value


def from_dict(cls: type, data: dict, *, where: str = "config") -> Any:
    """Build dataclass `cls` strictly: every key must be a field, nested dataclasses are built too."""
    hints, names = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in data.items():
        if key not in names:
            raise UserError(f"{where}: {key!r} is not known{nearest(key, names)}")
        kwargs[key] = _build(hints[key], value, f"{where}.{key}")
    return cls(**kwargs)


def _build(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, where=where)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    return value


def nearest(key: str, names: typing.Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}"


def override(config: Any, settings: list[str]) -> Any:
    """A copy of dataclass `config` with each 'dotted.key=value' applied (values are read as YAML).

    Raises UserError for an unknown key (naming the nearest), a missing '=' or a value of the wrong type.
    """
    changes: list[Change] = []
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq:
            raise UserError(f"--set {setting}: write it as key=value, e.g. --set optim.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {setting}: the value cannot be read as YAML; put it in quotes") from None
        changes.append((key.strip().split("."), value, setting))
    return _changed(config, changes)


Change = tuple[list[str], Any, str]  # path, value, the setting as it was typed


def _changed(config: Any, changes: list[Change]) -> Any:
    """All at once, so that numbers that only fit each other (a width, its heads) can be changed together."""
    if not changes:
        return config
    below: dict[str, list[Change]] = {}
    new: dict[str, Any] = {}
    for path, value, setting in changes:
        head, rest = path[0], path[1:]
        hint = _hint(config, head, setting)
        if rest:
            below.setdefault(head, []).append((rest, value, setting))
        else:
            new[head] = value if hint is None else _cast(hint, value, setting)
            below.pop(head, None)  # what was set below it before
    for head, deeper in below.items():
        old = config[head] if isinstance(config, dict) else getattr(config, head)
        new[head] = _changed(new.get(head, old), deeper)
    return {**config, **new} if isinstance(config, dict) else dataclasses.replace(config, **new)


def _hint(config: Any, head: str, setting: str) -> Any:
    """The type of a field, None in a dict. Raises UserError for one that is not there."""
    if isinstance(config, dict):
        if head not in config:
            raise UserError(f"--set {setting}: {head!r} is not known{nearest(head, config)}")
        return None
    if not dataclasses.is_dataclass(config):
        raise UserError(f"--set {setting}: there is nothing below {head!r}")
    names = [f.name for f in dataclasses.fields(config)]
    if head not in names:
        raise UserError(f"--set {setting}: {head!r} is not known{nearest(head, names)}")
    return typing.get_type_hints(type(config))[head]


def _cast(hint: Any, value: Any, setting: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is tuple and isinstance(value, list):
            return tuple(value)
        if kind is Any or (isinstance(kind, type) and isinstance(value, kind) and not (
            kind is int and isinstance(value, bool))):  # fmt: skip
            return value
        if kind is typing.Literal and value in typing.get_args(option):
            return value
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise UserError(f"--set {setting}: wanted {wanted}, got {value!r}")
