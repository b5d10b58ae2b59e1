"""The methods by name, and how words from the command line become their fields.

A method is a frozen dataclass of hyper-parameters with ``delta(model, edits) -> Delta``. Ours are
listed in ``METHODS``; others are found through the entry-point group ``unwrite.methods``. Classes
are imported when asked for, so that listing names needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, ClassVar, Protocol, runtime_checkable

from unwrite.errors import BadSetting

if typing.TYPE_CHECKING:
    from unwrite.delta import Delta
    from unwrite.edits import Edit
    from unwrite.model import Model

METHODS = {
    "full-ft": "unwrite.methods.full_ft:FullFT",
    "lora": "unwrite.methods.lora:LoRA",
    "ft-c": "unwrite.methods.constrained_ft:ConstrainedFT",
    "f-learning": "unwrite.methods.f_learning:FLearning",
    "delicate": "unwrite.methods.delicate:Delicate",
    "rome": "unwrite.methods.rome:ROME",
    "memit": "unwrite.methods.memit:MEMIT",
    "alpha-edit": "unwrite.methods.alpha_edit:AlphaEdit",
    "loc-ft": "unwrite.methods.loc_ft:LocFT",
    "auto": "unwrite.methods.auto:Auto",
}
ALIASES = {"ft": "full-ft", "dft": "delicate", "alphaedit": "alpha-edit", "ft-m": "loc-ft"}
DEFAULT = "auto"


@runtime_checkable
class Method(Protocol):
    """What a home asks of a method. The model must be bitwise unchanged after ``delta``."""

    name: ClassVar[str]

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        """The change that makes ``model`` answer the edits' prompts with their new answers."""


def method_names() -> list[str]:
    """All methods that can be named, ours first."""
    others = sorted(point.name for point in metadata.entry_points(group="unwrite.methods"))
    return [*METHODS, *(name for name in others if name not in METHODS)]


def method_class(name: str) -> type[Any]:
    """The class of a method by name or alias. Raises ``BadSetting`` listing the names there are."""
    name = ALIASES.get(name, name)
    if name in METHODS:
        module, _, attribute = METHODS[name].partition(":")
        return typing.cast("type[Any]", getattr(importlib.import_module(module), attribute))
    for point in metadata.entry_points(group="unwrite.methods", name=name):
        return typing.cast("type[Any]", point.load())
    raise BadSetting(
        f"There is no method {name!r}{_nearest(name, [*method_names(), *ALIASES])}. "
        f"Methods: {', '.join(method_names())}."
    )


def build(name: str, settings: Mapping[str, str]) -> Method:
    """A method from its name and ``--set`` pairs; nested fields are dotted (``tuner.rank=8``).

    Raises ``BadSetting`` for an unknown field (with the valid ones) or a value of the wrong type.
    """
    return typing.cast("Method", _build(method_class(name), dict(settings), name))


def build_fields(cls: type[Any], settings: Mapping[str, str]) -> Any:
    """A frozen dataclass of settings from words, by the same rules as a method's fields."""
    return _build(cls, dict(settings), cls.__name__.lower())


def describe(name: str) -> dict[str, Any]:
    """Name, aliases, paper, advice and fields (type, default) of a method, ready for JSON."""
    cls = method_class(name)
    hints = typing.get_type_hints(cls)
    return {
        "name": name,
        "aliases": [alias for alias, target in ALIASES.items() if target == name],
        "paper": getattr(cls, "paper", None),
        "advice": getattr(cls, "advice", None),
        "fields": {
            field.name: {"type": _type_name(hints[field.name]), "default": _plain(_default(field))}
            for field in dataclasses.fields(cls)
        },
    }


def settings_of(method: Any) -> dict[str, Any]:
    """The fields of a method as JSON values, for the ledger; nested methods with their names.

    A field that an earlier version did not know (``metadata["later"]``) is written only where it
    is not at its default: so that what that version began goes on under the same settings.
    """
    fields = {
        field.name: _plain(getattr(method, field.name))
        for field in dataclasses.fields(method)
        if not (field.metadata.get("later") and getattr(method, field.name) == field.default)
    }
    return {"name": getattr(method, "name", type(method).__name__), **fields}


def restored(settings: Mapping[str, Any]) -> Method:
    """The method of which ``settings_of`` gave these settings.

    Fields that it did not have then get their defaults. Raises ``BadSetting`` for a method that is
    not installed, or fields that it no longer has.
    """
    given = {key: value for key, value in settings.items() if key != "name"}
    name = str(settings.get("name"))
    cls = method_class(name)
    if gone := sorted(set(given) - {field.name for field in dataclasses.fields(cls)}):
        raise BadSetting(f"The method {name} has no field {gone[0]!r} in this version.")
    try:
        return typing.cast("Method", cls(**{key: _restored(one) for key, one in given.items()}))
    except TypeError as error:
        raise BadSetting(f"{name} cannot be made from its old settings: {error}") from None


def parts_of(method: Any) -> tuple[Any, ...]:
    """The methods that ``method`` makes up by itself and runs one after the other (``parts``, which
    a method may have); most hold what they use in fields, and have none."""
    return tuple(getattr(method, "parts", ()))


def fields_named(method: Any, field: str) -> list[Any]:
    """The values of ``field`` wherever ``method`` or a method inside it has that field."""
    found = []
    for own in dataclasses.fields(method):
        current = getattr(method, own.name)
        if own.name == field:
            found.append(current)
        elif dataclasses.is_dataclass(current) and not isinstance(current, type):
            found += fields_named(current, field)
    return found


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and "name" in value:
        return restored(value)
    return tuple(map(_restored, value)) if isinstance(value, list) else value


def replaced(method: Any, field: str, value: Any) -> tuple[Any, int]:
    """``method`` with ``field`` set wherever it or a method inside it has that field, and how many
    places that were."""
    changes: dict[str, Any] = {}
    count = 0
    for own in dataclasses.fields(method):
        current = getattr(method, own.name)
        if own.name == field:
            changes[own.name] = value
            count += 1
        elif dataclasses.is_dataclass(current) and not isinstance(current, type):
            changes[own.name], inner = replaced(current, field, value)
            count += inner
    return (dataclasses.replace(method, **changes) if changes else method), count


def _build(cls: type[Any], settings: dict[str, str], path: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, str]] = {}
    for key, text in settings.items():
        name, dot, rest = key.partition(".")
        if name not in fields:
            raise BadSetting(
                f"{path} has no field {name!r}{_nearest(name, list(fields))}. "
                f"Fields: {', '.join(fields)}."
            )
        if dot:
            nested.setdefault(name, {})[rest] = text
        elif _holds_method(fields[name]):
            values[name] = _build(method_class(text), {}, text)
        else:
            values[name] = _value(f"{path}.{name}", hints[name], text)
    for name, inner in nested.items():
        current = values.get(name, _default(fields[name]))
        if not dataclasses.is_dataclass(current) or isinstance(current, type):
            raise BadSetting(f"{path}.{name} has no fields of its own to set with a dot.")
        inner_path = f"{path}.{name}"
        given = {key.partition(".")[0]: key for key in inner}
        built = _build(type(current), inner, inner_path)
        kept = {
            field.name: getattr(current, field.name)
            for field in dataclasses.fields(current)
            if field.name not in given
        }
        values[name] = dataclasses.replace(built, **kept)
    try:
        return cls(**values)
    except TypeError as error:
        raise BadSetting(f"{path} cannot be made from these settings: {error}") from None


def _value(path: str, kind: Any, text: str) -> Any:
    """``text`` as a value of the annotated type; ``none`` where the type allows it."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            for choice in typing.get_args(option):
                if text == str(choice):
                    return choice
        elif option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        elif option is str:
            return text
        elif typing.get_origin(option) is tuple:
            (inner, *_) = typing.get_args(option)
            return tuple(_value(path, inner, part.strip()) for part in text.split(",") if part)
    raise BadSetting(f"{path} must be {_type_name(kind)}, not {text!r}.")


def _holds_method(field: dataclasses.Field[Any]) -> bool:
    return hasattr(_default(field), "delta")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return settings_of(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _type_name(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(_type_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{_type_name(typing.get_args(kind)[0])}, ..."
    if kind is type(None):
        return "none"
    return getattr(kind, "__name__", str(kind))


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
