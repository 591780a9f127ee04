"""Reference pages that cannot drift from the code: three directives, and docstrings read as plain text.

`options` shows the settings of a command, from its config dataclass; `public` all that a module's `__all__` names;
`room` a subpackage with its modules.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx
from sphinx.domains.python import PyAttribute
from sphinx.util.docutils import SphinxDirective

from rl_lora.scripts.help import metavar, texts_of
from rl_lora.scripts.schema import options_of, schema_of

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
SECTION = re.compile(r"(Args|Raises|Returns):$")
ANNOTATED = re.compile(r"(?:~?typing\.)?Annotated\[(\w+)(?:, ~?[\w.]+\([^()]*\))+\]")
ENTRY = re.compile(r"([\w\\*, ]+): (.*)")


class Options(SphinxDirective):
    """```{options} module:Config``` with `:program: rl-lora train`; `:like:` another config shows what differs."""

    required_arguments = 1
    option_spec: ClassVar = {"program": directives.unchanged_required, "like": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        config = named(self.arguments[0])()
        other = named(self.options["like"])() if "like" in self.options else None
        text = "\n".join(option_lines(config, other))
        program = f"```{{program}} {self.options['program']}\n```\n\n"
        return self.parse_text_to_nodes(program + text, allow_section_headings=True)


class Public(SphinxDirective):
    """```{public} module```, followed by further names of the form module.name."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        names = [f"{module.__name__}.{name}" for name in sorted(module.__all__, key=str.lower)] + self.arguments[1:]
        text = "\n".join(line for name in names for line in autodoc_lines(name))
        return self.parse_text_to_nodes(f"````{{eval-rst}}\n{text}\n````")


class Room(SphinxDirective):
    """```{room} package```: its docstring, and its modules with all that has a docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = importlib.import_module(self.arguments[0])
        [folder] = map(Path, room.__path__)
        modules = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
        texts = [f"{escaped(inspect.getdoc(room) or '')}\n"]
        texts += [
            f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {room.__name__}.{name}\n   :members:\n```\n"
            for name in modules
        ]
        return self.parse_text_to_nodes("\n".join(texts), allow_section_headings=True)


def named(place: str) -> Any:
    """The object of `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def option_lines(config: Any, other: Any = None) -> Iterator[str]:
    """Markdown: a section a group, and in it the options of a config; beside another config those that differ."""
    texts, groups = texts_of(config), schema_of(config).groups
    there = {} if other is None else dict(options_of(other))
    for section in ("", *groups):
        if other is None:
            yield f"### {section or 'general'}\n\n{escaped(groups.get(section, ''))}\n"
        for name, option in options_of(config):
            if name.rpartition(".")[0] == section and (name not in there or there[name].default != option.default):
                yield f"```{{option}} --{name} {metavar(option.hint)}"
                text = texts.get(name, "")
                told = [f"{option.bounds.capitalize()}."] if option.bounds else []
                if option.shown != "null" or "y default" not in text:  # else the text says it
                    told.append(f"Default: `{option.shown or ' '}`.")
                yield " ".join([escaped(text), *told])
                yield "```\n"


def escaped(text: str) -> str:
    """Plain text with `code` as Markdown."""
    parts = CODE.split(text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_\[\]<>|$#{}~])", r"\\\1", p) for p in parts)


def autodoc_lines(name: str) -> Iterator[str]:
    """The directive that documents `module.name`; of plain data its name alone."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(value):
        bases = "   :show-inheritance:\n" if value.__bases__ != (object,) else ""
        yield f".. autoclass:: {name}\n   :members:\n{bases}"
    elif inspect.isroutine(value):
        yield f".. autofunction:: {name}\n"
    else:
        yield f".. py:data:: {name}\n"


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring, plain text with `code`, lists and Args, into what Sphinx reads."""
    parts = CODE.split("\n".join(lines))
    text = ""
    for part, behind in zip(parts, [*parts[1:], ""], strict=True):
        if part.startswith("`"):
            text += f"``{' '.join(part.strip('`').split())}``" + ("\\ " if behind[:1].isalnum() else "")
        else:
            text += re.sub(r"([\\*|]|_(?!\w))", r"\\\1", part)
    lines[:] = list(with_sections(text.split("\n")))


def with_sections(lines: list[str]) -> Iterator[str]:
    """Args, Raises and Returns become fields, their entries lists; an indented block behind a colon stays as it is."""
    inside = literal = -1
    listed = False  # whether the section has entries
    for i, line in enumerate(lines):
        if literal >= 0:
            if not line.strip() or indent(line) > literal:
                yield re.sub(r"\\(.)", r"\1", line)
                continue
            literal = -1
        if SECTION.match(line.strip()):
            inside, listed = indent(line), False
            yield from ("", f"{' ' * inside}:{line.strip()}", "")
            continue
        if line.strip() and indent(line) <= inside:
            inside = -1
            yield ""
        entry = ENTRY.match(line.strip()) if inside >= 0 and indent(line) == inside + 4 else None
        ahead = [later for later in lines[i + 1 :] if later.strip()]
        if inside >= 0 and not entry and line.strip():
            line = f"{' ' * (inside + 6)}{line.strip()}" if listed else f"  {line}"
        if entry:
            listed = True
            yield f"{' ' * (inside + 4)}- **{entry[1]}**: {entry[2]}"
        elif line.rstrip().endswith(":") and ahead and not lines[i + 1].strip() and indent(ahead[0]) > indent(line):
            literal = indent(line)
            yield line.rstrip() + ":"
        else:
            yield line


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def plain_signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, args: str | None, to: str | None) -> Any:
    """Take the bounds out of a signature's types: `Annotated[int, Ge(1)]` is int."""
    return ANNOTATED.sub(r"\1", args or "") or args, to


class PlainAttribute(PyAttribute):
    """An attribute with its type and without the bounds beside it, which the options show."""

    def handle_signature(self, sig: str, signode: desc_signature) -> tuple[str, str]:
        if "type" in self.options:
            self.options["type"] = ANNOTATED.sub(r"\1", self.options["type"])
        return super().handle_signature(sig, signode)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options", Options)
    app.add_directive("public", Public)
    app.add_directive("room", Room)
    app.add_directive_to_domain("py", "attribute", PlainAttribute, override=True)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
