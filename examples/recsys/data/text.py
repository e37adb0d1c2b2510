"""What sources say of an item, as plain text."""

from __future__ import annotations

import ast
import html
import re
import textwrap
from collections.abc import Iterable
from html.parser import HTMLParser

MAX_DESCRIPTION = 1000
"""Characters: about as many as the 256 tokens that small text encoders read."""


def describe(*parts: str) -> str:
    """The parts that say something as sentences, one after the other, in ``MAX_DESCRIPTION`` characters at most.

    Each part is cleaned by :func:`plain_text`; what is too long ends after a whole word.

    Example::

        >>> describe("Acme", "", "['<b>Sticks</b> well.', 'Dries fast']")
        'Acme. Sticks well. Dries fast.'
    """
    cleaned = [text for part in parts if (text := plain_text(part))]
    sentences = (text if text.endswith((".", "!", "?")) else f"{text}." for text in cleaned)
    return textwrap.shorten(" ".join(sentences), MAX_DESCRIPTION, placeholder="")


def plain_text(raw: str) -> str:
    """Text without markup and with single spaces; what is a list of strings as Python writes it is joined first.

    Entities become their characters, also those that were escaped twice. Tags, scripts and styles are dropped, and a
    tag that was cut off at the end.

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
    """Collects what is between the tags."""

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
