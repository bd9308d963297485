"""Formulas between dollar signs become MathML while the site is built: browsers draw them without a script."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from math_core import LatexToMathML

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""What the Markdown extension arithmatex makes of a formula in a line, and of one by itself."""
CONVERTER = LatexToMathML(fancy_error=False)


def mathml(match: re.Match[str]) -> str:
    """One formula; a wrong one raises, and the build fails."""
    block, latex = match[1] == "div", unescape(match[2])
    drawn = CONVERTER.convert_with_local_state(latex, displaystyle=block)
    return f'<div class="formula">{drawn}</div>' if block else drawn


def on_page_content(html: str, **_kwargs: Any) -> str:
    """Replace the formulas of a page: mkdocs calls this once for each."""
    return FORMULA.sub(mathml, html)
