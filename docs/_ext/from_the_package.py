"""Directives that read the package: the table of public names, the commands' help, programs."""

import argparse
import inspect
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import distclip
from distclip.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
# protocols between a policy or sink of one's own and the clipper, and what they hand over; what
# was added last
PROVISIONAL = {
    "Clamp",
    "Escalate",
    "LocalGrads",
    "LocalStats",
    "Norms",
    "Policy",
    "RankNorms",
    "Scale",
    "Sink",
    "UnitScale",
    "Watch",
    "by_optimizer",
    "per_expert",
}


def summary(thing):
    """The docstring's first sentence, as reStructuredText."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


def kind_of(thing):
    if inspect.isclass(thing):
        return "error" if issubclass(thing, Exception) else "class"
    return "function" if inspect.isfunction(thing) else "constant"


class PublicApi(SphinxDirective):
    """A row for each name of `distclip.__all__`, with a link to its entry."""

    def run(self):
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
        rows = [("name", "kind", "stability", "in one line")]
        for name in sorted(distclip.__all__, key=str.lower):
            thing = getattr(distclip, name)
            kind = kind_of(thing)
            said = "" if kind == "constant" else summary(thing)
            stability = "provisional" if name in PROVISIONAL else "stable"
            rows.append((f":py:obj:`{name} <distclip.{name}>`", kind, stability, said))
        for row in rows:
            lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
        return parsed(self, lines)


class CommandLine(SphinxDirective):
    """A section for each command: what --help prints."""

    def run(self):
        out = []
        for name, entry in COMMANDS.items():
            parser = argparse.ArgumentParser(
                prog=f"distclip {name}", description=entry.line, formatter_class=Wide
            )
            entry.add_arguments(parser)
            section = nodes.section(ids=[nodes.make_id(f"distclip {name}")])
            section += nodes.title(text=f"distclip {name}")
            text = parser.format_help()
            section += nodes.literal_block(text, text, language="none")
            out.append(section)
        return out


class FilesOf(SphinxDirective):
    """A section for each program of a folder of the repository, with the whole of it."""

    required_arguments = 1

    def run(self):
        out = []
        for path in sorted((ROOT / self.arguments[0]).glob("*.py")):
            if path.stem in ("__main__", "showing"):
                continue
            self.env.note_dependency(path)
            text = path.read_text()
            section = nodes.section(ids=[nodes.make_id(path.stem)])
            section += nodes.title(text=path.name)
            section += nodes.literal_block(text, text, language="python")
            out.append(section)
        return out


class Wide(argparse.HelpFormatter):
    """Of one width wherever the site is built."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=88)


def parsed(directive, lines):
    node = nodes.Element()
    directive.state.nested_parse(StringList(lines, "public-api"), directive.content_offset, node)
    return node.children


def setup(app):
    app.add_directive("public-api", PublicApi)
    app.add_directive("command-line", CommandLine)
    app.add_directive("files-of", FilesOf)
    return {"parallel_read_safe": True}
