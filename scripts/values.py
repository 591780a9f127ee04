"""Values of a type, from the texts of a command line and from YAML files.

A text stays the text that was typed: where an option takes a text, all of it counts, and YAML has no say. Inside a
mapping (`--env.kwargs.x ...`) nothing says what type is meant: there a number, true or false, null, `[a list]` and
`{a mapping}` are what YAML takes them for, and everything else is a text. Nothing is dropped: a comment inside of a
list or a mapping that is typed is an error.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from rl_lora.system.plain_yaml import BOOL, FLOAT, INT, NULL, Loader, items

NONE = type(None)
COMMAS = re.compile(r"[^,\s]+(,[^,\s]+)*")


def plain(node: yaml.Node) -> Any:
    """What a node holds, by YAML's own types."""
    loader = Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(explained(error)) from None
    finally:
        loader.dispose()


def explained(error: yaml.YAMLError) -> str:
    """Line and problem, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(str(problem or error).split())


def described(hint: Any) -> str:
    """What a value must be, for a message."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NONE: "null"}
    if hint in kinds:
        return kinds[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list of {described(args[0]).removeprefix('a ')}s" if args[0] is not Any else "a list"
    if origin is tuple:
        return f"a list such as [{', '.join('0.5' for _ in args)}]"
    return "a mapping such as {name: value}" if dict in (origin, hint) else "plain data"


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_list(hint: Any) -> bool:
    """Whether an option takes several values and nothing but several, or null."""
    kinds = set(members(hint)) - {NONE}
    return all(get_origin(kind) in (list, tuple) for kind in kinds)


def from_texts(texts: list[str], hint: Any, bracketed: bool) -> Any:
    """A list of what was typed behind an option. `bracketed`: one text in brackets is a list as YAML has it.

    Raises:
        ValueError: "must be ..., got ..."
    """
    if texts == ["null"] and NONE in members(hint):
        return None
    (hint,) = set(members(hint)) - {NONE}
    of_numbers = str not in get_args(hint)
    if len(texts) == 1 and (bracketed or of_numbers) and (node := enclosed(texts[0], "[")) is not None:
        return from_node(node, hint)
    if of_numbers:
        texts = [part for text in texts for part in (text.split(",") if COMMAS.fullmatch(text) else [text])]
    return _sequence(texts, hint, from_text, texts)


def from_text(text: str, hint: Any) -> Any:
    """The value of an option that was typed. Raises ValueError: "must be ..., got ..."."""
    kinds = members(hint)
    if NONE in kinds and text == "null":
        return None
    for opening, kind in (("[", (list, tuple)), ("{", (dict,))):
        fitting = [k for k in kinds if k in kind or get_origin(k) in kind]
        if fitting and (node := enclosed(text, opening, must=str not in kinds)) is not None:
            return from_node(node, fitting[0])
    for value in _matching(text, kinds):
        return value
    if str in kinds:
        return text
    raise ValueError(f"must be {described(hint)}, got {text!r}")


def _matching(text: str, kinds: Sequence[Any]) -> Iterator[Any]:
    """A text as those of some types that it can be, in their order of precedence; texts themselves left out."""
    tag = _tag(text.strip())
    if bool in kinds and tag == BOOL:
        yield plain(yaml.ScalarNode(tag, text.strip()))
    if int in kinds and tag == INT:
        yield plain(yaml.ScalarNode(tag, text.strip()))
    if float in kinds and tag in (INT, FLOAT):
        yield float(plain(yaml.ScalarNode(tag, text.strip())))
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from (choice for choice in get_args(kind) if str(choice) == text)


def _tag(text: str) -> str:
    """What YAML takes a text without quotes for."""
    return str(Loader("").resolve(yaml.ScalarNode, text, (True, False)))


def from_untyped(text: str) -> Any:
    """A value inside of a mapping, as it was typed. What is in quotes because it would otherwise be no text loses them:
    `"null"`, `"3"`, `"[a]"`. Raises ValueError where some of it would be lost."""
    tag = _tag(text)
    if text == "null" or tag in (BOOL, INT, FLOAT):
        return plain(yaml.ScalarNode(tag, text))
    if text[:1] in ("'", '"'):
        try:
            quoted = yaml.compose(text, Loader)
        except yaml.YAMLError:
            return text
        whole = isinstance(quoted, yaml.ScalarNode) and quoted.style and quoted.end_mark.index == len(text)
        if isinstance(quoted, yaml.ScalarNode) and whole and not isinstance(from_untyped(quoted.value), str):
            return quoted.value
        return text
    for opening in ("[", "{"):
        if (node := enclosed(text, opening)) is not None:
            return plain(node)
    return text


def enclosed(text: str, opening: str, must: bool = False) -> yaml.Node | None:
    """The list or mapping that a text is, if it is one; `must`: or an error that says why it is none.

    `{question}` is none: a mapping has colons.
    """
    closed = text.rstrip().endswith({"[": "]", "{": "}"}[opening])
    if not text.lstrip().startswith(opening) or not (closed or must):
        return None
    try:
        node = yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        if not must:
            return None
        comment = "; behind # YAML reads nothing: put such a text in quotes" if "#" in text else ""
        raise ValueError(f"is no YAML, {explained(error)}{comment}, got {text!r}") from None
    if not isinstance(node, yaml.CollectionNode) or not node.flow_style:
        return None
    if isinstance(node, yaml.MappingNode) and node.value and not must:
        values = [value for _, value in node.value]
        if all(isinstance(v, yaml.ScalarNode) and v.style is None and v.value == "" for v in values):
            return None
    end = 0
    for token in yaml.scan(text, Loader):
        if text[end : token.start_mark.index].strip():
            raise ValueError(f"has a comment, which YAML leaves out: put texts with # in quotes, got {text!r}")
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
            raise ValueError(f"has a text that begins with &, * or !: put it in quotes, got {text!r}")
        end = token.end_mark.index
    return node


def from_node(node: yaml.Node, hint: Any) -> Any:
    """The value of an option in YAML. Where it takes a text, what is written is the text, also if it could be a number.

    Raises:
        ValueError: "must be ..., got ..."
    """
    kinds = members(hint)
    if isinstance(node, yaml.ScalarNode):
        is_plain = node.style is None
        if is_plain and node.tag == NULL:
            if NONE in kinds:
                return None
        else:
            for value in _matching(node.value, [k for k in kinds if is_plain or get_origin(k) is Literal]):
                return value
            if str in kinds:
                return node.value
    for kind in kinds:
        origin = get_origin(kind) or kind
        if origin in (list, tuple) and isinstance(node, yaml.SequenceNode):
            return _sequence(node.value, kind, from_node, plain(node))
        if origin is dict and isinstance(node, yaml.MappingNode):
            return mapping(node)
    found = plain(node)
    if Any in kinds:
        return found
    raise ValueError(f"must be {described(hint)}, got {'null' if found is None else repr(found)}")


def mapping(node: yaml.MappingNode) -> dict[str, Any]:
    """Names and values of any type."""
    result: dict[str, Any] = {}
    for key, value in items(node):
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"must have texts as names, got {plain(key)!r}")
        result[key.value] = plain(value)
    return result


def _sequence(found: Sequence[Any], hint: Any, convert: Callable[[Any, Any], Any], shown: Any) -> Any:
    """A list or tuple, each of whose items is converted."""
    kind, args = get_origin(hint), get_args(hint)
    of_each = args if kind is tuple else [args[0]] * len(found)
    try:
        return kind(convert(item, each) for item, each in zip(found, of_each, strict=True))
    except ValueError:
        raise ValueError(f"must be {described(hint)}, got {shown!r}") from None
