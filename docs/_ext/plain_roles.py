"""Single backticks in docstrings: a link where they name something on a reference page, else code.

Docstrings are written for readers of the source, in what Markdown and reStructuredText have in
common; where they differ is here.
"""

import re

from sphinx.roles import XRefRole

import distclip

ALSO = re.compile(r"(?<=Error) \(an? \w+Error\)(?=:)")


def missing(app, env, node, contnode):
    """Not a broken link: most backticks are arguments and code."""
    return contnode if node.get("plain") else None


class Plain(XRefRole):
    def process_link(self, env, refnode, has_explicit_title, title, target):
        refnode["plain"] = True
        refnode["refdomain"], refnode["reftype"] = "py", "obj"
        name = target.removesuffix("()").removeprefix("distclip.")
        target = f"distclip.{name}" if name.partition(".")[0] in distclip.__all__ else name
        return title, target


def as_rst(app, what, name, thing, options, lines):
    """Bars of a norm, |g|, are no substitutions; the built-in class of an error is on the page of
    errors."""
    lines[:] = [ALSO.sub("", line).replace("|", "\\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon
    app.add_role("plain", Plain())
    app.connect("missing-reference", missing, priority=1)
    return {"parallel_read_safe": True}
