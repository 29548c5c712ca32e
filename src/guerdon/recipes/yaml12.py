"""YAML with the scalars of YAML 1.2: `1e-4` is a number, `no` and `on` are text, `010` is ten.

PyYAML follows YAML 1.1, where those three are text, booleans and eight. Keys given twice are an error here.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


# libyaml's parser and emitter where PyYAML was built with them
_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: type[yaml.SafeDumper] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Loader(_SafeLoader):
    """Safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - the name is PyYAML's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, in which no key may stand twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, (str, int, float)) else str(key))
        return super().construct_mapping(node, deep=deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """A whole number: decimal also with leading zeros, 0o octal, 0x hexadecimal."""
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


class Dumper(_SafeDumper):
    """Safe dumper that quotes whatever YAML 1.1 or 1.2 would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _RESOLVERS:
    for _kind in (Loader, Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole_number)
Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def loads(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: the text is not YAML, or has a key twice.

    Example:
        >>> loads("{lr: 1e-4, mixed_precision: no, n: 010}")
        {'lr': 0.0001, 'mixed_precision': 'no', 'n': 10}
    """
    return yaml.load(text, Loader=Loader)


def dumps(value: Any) -> str:
    """Write YAML, keys in their order, innermost collections on one line."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def scalar(text: str) -> Any:
    """The value of a command-line word: what YAML makes of it, or the text itself where it is not YAML.

    Example:
        >>> scalar("1e-4"), scalar("[0.9, 0.99]"), scalar("null"), scalar("[0-9]+ = x")
        (0.0001, [0.9, 0.99], None, '[0-9]+ = x')
    """
    try:
        return loads(text)
    except yaml.YAMLError:
        return text
