"""What is wrong with a configuration, one line for each key, in the words of its YAML file."""

from __future__ import annotations

import difflib

import yaml
from pydantic import ValidationError

#: Types of errors that pydantic tells in the words of Python.
_WORDS = {
    "tuple_type": "input should be a list",
    "dict_type": "input should be a section",
    "model_type": "input should be a section",
    "model_attributes_type": "input should be a section",
    "missing": "the list is too short",
}


def explain(error: ValidationError, kinds: dict[str, tuple[str, ...]], keys: list[str]) -> str:
    """One line for each key that is wrong: key, value and what is accepted.

    kinds: the accepted kinds of the sections that have several forms. keys: every accepted `section.key`.
    """
    wrong: dict[str, list[dict]] = {}
    for item in error.errors():
        wrong.setdefault(_key_of(item["loc"], kinds), []).append(item)
    return "\n".join(_line(key, items, kinds, keys) for key, items in wrong.items())


def explain_yaml(error: yaml.YAMLError) -> str:
    """Where a text is no YAML, and why, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _line(key: str, items: list[dict], kinds: dict[str, tuple[str, ...]], keys: list[str]) -> str:
    first = items[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "union_tag_invalid":
        return f"{key}.kind={first['ctx']['tag']}: accepted are {', '.join(kinds[key])}"
    if first["type"] == "extra_forbidden" and key in keys:
        section, kind = first["loc"][:2]
        return f"{key}: {section}.kind={kind} has no such option"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else "")
    # A list was given, and may be: the alternatives to one say nothing about what is wrong in it.
    inside = [item for item in items if isinstance(item["loc"][-1], int) and item["type"] != "missing"]
    if inside:
        key, items = f"{key}[{inside[0]['loc'][-1]}]", inside[:1]
    return f"{key}={_shown(items[0]['input'])}: {', or '.join(_messages(items))}"


def _messages(items: list[dict]) -> list[str]:
    """What is accepted; `input should be` is said once."""
    messages = [_WORDS.get(item["type"], item["msg"][0].lower() + item["msg"][1:]) for item in items]
    messages = [
        m.replace("tuple should", "the list should").replace(" after validation", "") for m in messages
    ]
    return [*messages[:1], *(message.removeprefix("input should be ") for message in messages[1:])]


def _shown(value) -> str:
    """YAML has lists where the configuration has tuples."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)


def _key_of(location: tuple, kinds: dict[str, tuple[str, ...]]) -> str:
    """`section.key` of an error; the parts that name a branch of a union are left out."""
    section, *rest = [str(part) for part in location] or [""]
    values = kinds.get(section, ())
    names = [part for part in rest if part not in values and part.isidentifier()]
    return ".".join([section, *names[:1]]) if section else ""
