"""Descriptions of items as plain text."""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections.abc import Iterable
from html.parser import HTMLParser

MAX_DESCRIPTION = 1000
"""In characters; about the 256 tokens that small text encoders read."""


def describe(*parts: str) -> str:
    """Join the non-empty parts as sentences, up to ``MAX_DESCRIPTION`` characters.

    Each part is cleaned by :func:`plain_text`. A text that is too long ends after a whole word.

    Example::

        >>> describe("Acme", "", "['<b>Sticks</b> well.', 'Dries fast']")
        'Acme. Sticks well. Dries fast.'
    """
    cleaned = [text for part in parts if (text := plain_text(part))]
    sentences = (text if text.endswith((".", "!", "?")) else f"{text}." for text in cleaned)
    return textwrap.shorten(" ".join(sentences), MAX_DESCRIPTION, placeholder="")


def plain_text(raw: str) -> str:
    """Return text without markup and with single spaces; a list of strings in Python notation is joined first.

    Entities become their characters, even if escaped twice. Tags, scripts, styles and a truncated tag at the end are
    dropped.

    Example::

        >>> plain_text("['2&amp;quot; nails<br/>by the <b>pound</b>', '']")
        '2" nails by the pound'
    """
    reader = _TextReader()
    reader.feed(_CUT_TAG.sub("", html.unescape(" ".join(_strings(raw)))))
    reader.close()
    return re.sub(r"\s+", " ", html.unescape("".join(reader.pieces))).strip()


_CUT_TAG = re.compile(r"<[/a-zA-Z]*$")


def _strings(raw: str) -> Iterable[str]:
    if raw.lstrip().startswith("["):
        try:
            value = ast.literal_eval(raw.strip())
        except (ValueError, SyntaxError):
            return [raw]
        if isinstance(value, list):
            return map(str, value)
    return [raw]


class _TextReader(HTMLParser):
    """Collects the text between the tags."""

    hidden = ("script", "style")
    inline = ("a", "b", "em", "i", "span", "strong", "sub", "sup", "u")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.hidden
        self.pieces.append("" if tag in self.inline else " ")

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(0, self.depth - (tag in self.hidden))
        self.pieces.append("" if tag in self.inline else " ")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.pieces.append(data)
