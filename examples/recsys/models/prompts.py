"""Prompts and responses of MiniOneRec: its fine-tuning tasks (arXiv 2510.24431) as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

Task: TypeAlias = Literal["next_item", "item_text", "fusion", "titles", "titles_to_codes"]
Tokens: TypeAlias = list[int]


class TaskForm(NamedTuple):
    """The form in which a task shows the history and asks for the next item: ``"codes"`` or ``"title"`` each."""

    shown: str
    asked: str


HISTORY_TASKS: dict[Task, TaskForm] = {
    "next_item": TaskForm("codes", "codes"),
    "fusion": TaskForm("codes", "title"),
    "titles": TaskForm("title", "title"),
    "titles_to_codes": TaskForm("title", "codes"),
}
TEXT_TASKS: tuple[Task, ...] = ("item_text", "fusion", "titles", "titles_to_codes")

HISTORY = {
    "codes": ("A shopper took these items, the latest last:\n", ", "),
    "title": ("A shopper took items with these titles, the latest last:\n", "\n"),
}
"""The start of a history, and the separator of its items."""
NEXT = {"codes": "\nThe next item is:\n", "title": "\nThe title of the next item is:\n"}
SUBJECT = {
    "codes": "This is an item:\n",
    "title": "This is the title of an item:\n",
    "description": "This is the description of an item:\n",
}
QUESTION = {"codes": "\nThe item is:\n", "title": "\nIts title is:\n", "description": "\nIts description is:\n"}


class Example(NamedTuple):
    """A prompt and the response to it, which ends with the end token."""

    prompt: Tokens
    response: Tokens


@dataclass(frozen=True)
class ItemTokens:
    """The tokens of each item, by id; entry 0, the padding, is empty.

    Args:
        codes: tokens of the codes.
        titles: tokens of the titles; None if no task needs them.
        descriptions: tokens of the descriptions, empty if an item has none; None if no task needs them.
    """

    codes: list[Tokens]
    titles: list[Tokens] | None = None
    descriptions: list[Tokens] | None = None

    def of(self, kind: str) -> list[Tokens]:
        """The tokens of all items as ``"codes"``, ``"title"`` or ``"description"``."""
        found = {"codes": self.codes, "title": self.titles, "description": self.descriptions}[kind]
        if found is None:
            raise RuntimeError("There are no texts of the items yet: the model takes them from its data in setup().")
        return found


class PromptWriter:
    """Builds prompts and responses of tasks about histories and items, from texts that are tokenized once.

    Pieces are encoded one by one, so an instruction has the same tokens whatever follows it. A prompt and its response
    have at most ``cutoff`` tokens together. A response gets half of the tokens that the instruction leaves, or more if
    the prompt needs fewer. Of a history the latest items are kept, as many as fit completely.

    Args:
        encode: maps a text to tokens, without special ones.
        end: the token after a response; None if the vocabulary has none.
        cutoff: largest number of tokens of prompt and response.
        levels: number of codes per item.

    Raises:
        ValueError: if ``cutoff`` leaves no room for the codes of two items.
    """

    def __init__(self, encode: Callable[[str], Tokens], end: int | None, cutoff: int, levels: int) -> None:
        self.history = {kind: (encode(head), encode(between)) for kind, (head, between) in HISTORY.items()}
        self.next = {kind: encode(text) for kind, text in NEXT.items()}
        self.subject = {kind: encode(text) for kind, text in SUBJECT.items()}
        self.question = {kind: encode(text) for kind, text in QUESTION.items()}
        self.end = [] if end is None else [end]
        self.cutoff = cutoff
        heads = [*(head for head, _ in self.history.values()), *self.subject.values()]
        tails = [*self.next.values(), *self.question.values()]
        least = max(map(len, heads)) + max(map(len, tails)) + 2 * levels + 2 * len(self.end)
        if cutoff < least:
            raise ValueError(
                f"cutoff={cutoff} tokens do not hold an instruction and the codes of two items: set cutoff to {least} "
                "or more with this tokenizer."
            )

    def next_item(self, history: Sequence[int], items: ItemTokens) -> Tokens:
        """The prompt that asks for the codes of the item after a history; it leaves room for the response."""
        return self.of_history("next_item", history, None, items).prompt

    def of_history(self, task: Task, history: Sequence[int], target: int | None, items: ItemTokens) -> Example:
        """A task about a history (item ids, oldest first) and the next item; None leaves room for any codes."""
        form = HISTORY_TASKS[task]
        head, between = self.history[form.shown]
        shown, asked = items.of(form.shown), items.of(form.asked)
        return self._fit(
            head,
            [shown[item] for item in history],
            between,
            self.next[form.asked],
            # All items have the same number of codes, so item 1 serves to leave room.
            [*asked[target or 1], *self.end],
        )

    def of_item(self, item: int, shown: str, asked: str, items: ItemTokens) -> Example:
        """The task to give the codes of an item from its title or description, or these from the codes."""
        return self._fit(
            self.subject[shown],
            [items.of(shown)[item]],
            [],
            self.question[asked],
            [*items.of(asked)[item], *self.end],
        )

    def _fit(self, head: Tokens, pieces: list[Tokens], between: Tokens, tail: Tokens, response: Tokens) -> Example:
        room = self.cutoff - len(head) - len(tail)
        needed = sum(map(len, pieces)) + len(between) * (len(pieces) - 1)
        response = response[: max(room - needed, (room + 1) // 2)]
        room -= len(response)
        kept = pieces[-1][:room]
        for piece in pieces[-2::-1]:
            if len(piece) + len(between) + len(kept) > room:
                break
            kept = [*piece, *between, *kept]
        return Example([*head, *kept, *tail], response)


def draw_example(
    tasks: Sequence[Task],
    writer: PromptWriter,
    history: Sequence[int],
    target: int,
    items: ItemTokens,
    generator: torch.Generator | None = None,
) -> Example:
    """Draw one of the tasks uniformly, with ``generator`` or torch's default one.

    The task ``item_text`` is about a random item of the catalogue. Its codes are on one side, its title or, if it has
    one, its description on the other.
    """

    def draw(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    task = tasks[draw(len(tasks))]
    if task != "item_text":
        return writer.of_history(task, history, target, items)
    item = 1 + draw(len(items.codes) - 1)
    text = ("title", "description")[draw(2) if items.of("description")[item] else 0]
    shown, asked = (("codes", text), (text, "codes"))[draw(2)]
    return writer.of_item(item, shown, asked, items)
