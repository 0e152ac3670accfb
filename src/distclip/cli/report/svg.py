"""Adapts matplotlib's SVG to a page: the page's colours and font, unique ids, no external
references."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape


def inline_svg(
    svg: str, prefix: str, css_class: str, label: str, colours: Mapping[str, str]
) -> str:
    """An `<svg>` element for HTML that follows light and dark through CSS variables.

    Args:
        svg: the file that matplotlib wrote, with text as text (svg.fonttype "none").
        prefix: set before all ids, which must differ between the figures of a page.
        css_class: for the element.
        label: what the figure shows, for screen readers.
        colours: name of a CSS variable → the colour (#rrggbb) that stands for it in the file.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # only tags: the text between them is shown as it is
    svg = re.sub(r"<[^>]*>", lambda tag: _adapted_tag(tag[0], prefix, colours), svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg class="{css_class}" role="img" aria-label="{escape(label)}" {box[0] if box else ""}>'
    )
    return re.sub(
        r"\s*\n\s*", "\n", re.sub(r"^<svg.*?>", lambda _: head, svg, count=1, flags=re.DOTALL)
    ).strip()


def _adapted_tag(tag: str, prefix: str, colours: Mapping[str, str]) -> str:
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"(\.\d{3})\d+", r"\1", tag)
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
    for name, colour in colours.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag
