"""What mkdocs does beyond Markdown: tables made from the code, equations as MathML, pages that list themselves.

Nothing on a page is fetched when it is read: equations become MathML here, which browsers show by themselves.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import tables
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_MARKER = re.compile(r"^<!-- guerdon: (\w+)(?: ([\w./]+))? -->$", re.MULTILINE)
_MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_WORD = re.compile(r"\\mathrm\{([A-Za-z]{2,})\}")
# a minus after an opening bracket, a comma or an equals sign is a sign; a bar belongs to what it encloses
_SIGN = re.compile(r"((?:\(|\[|&#x00028;|&#x0002C;|&#x0003D;)</mo>(?:<mspace[^>]*/>)?)<mo>(?=&#x02212;</mo>)")
_BAR = re.compile(r"<mo[^>]*>(?:\||&#x0007C;|&#x02223;)</mo>")
_SECTIONS = {"Methods": "methods", "How-to": "howto"}


def on_config(config: Any) -> Any:
    """List the pages of methods/ and howto/ that the configuration does not name."""
    docs = Path(config.docs_dir)
    named = re.findall(r"[\w/-]+\.md", repr(config.nav))
    for section, folder in _SECTIONS.items():
        found = sorted(f"{folder}/{path.name}" for path in (docs / folder).glob("*.md"))
        pages: list[Any] = [page for page in found if page not in named]
        if not pages:
            continue
        entry = next((entry for entry in config.nav if section in entry), None)
        if entry is None:
            guides = next(i for i, one in enumerate(config.nav) if "Guides" in one)
            config.nav.insert(guides + 1, {section: pages})
        else:
            entry[section] = [*entry[section], *pages]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `<!-- guerdon: NAME ARGUMENT -->` by what `tables.NAME(ARGUMENT)` gives."""

    def generated(match: re.Match[str]) -> str:
        name, argument = match[1], match[2]
        if name not in tables.TABLES:
            raise PluginError(
                f"{page.file.src_path}: there is no table {name!r}. There are: {', '.join(tables.TABLES)}."
            )
        return tables.TABLES[name](*([argument] if argument else []))

    return _MARKER.sub(generated, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace LaTeX by MathML."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        block = latex.startswith("\\[")
        return _mathml(latex[2:-2].strip(), block, page.file.src_path)

    return _MATH.sub(mathml, content)


def _mathml(latex: str, block: bool, where: str) -> str:
    # a word set upright is one word, not a product of letters
    prepared = _WORD.sub(r"\\text{\1}", latex)
    try:
        found = convert(prepared, display="block" if block else "inline")
    except Exception as error:  # the converter raises many kinds; the page and the formula are what helps
        raise PluginError(
            f"{where}: the formula {latex!r} cannot be converted: {type(error).__name__} {error}"
        ) from error
    if re.search(r"<m[iotn][^>]*>(?:&|\\[^<]*)</m", found):
        raise PluginError(f"{where}: the formula {latex!r} has a command that the converter does not know.")
    found = _BAR.sub('<mi mathvariant="normal">|</mi>', _SIGN.sub(r'\1<mo form="prefix">', found))
    return f'<div class="math">{found}</div>' if block else found
