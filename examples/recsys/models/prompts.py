"""What MiniOneRec reads and is to answer: the tasks of its fine-tuning (arXiv 2510.24431) as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

Task: TypeAlias = Literal["next_item", "item_text", "fusion", "titles", "titles_to_codes"]
Tokens: TypeAlias = list[int]


class TaskForm(NamedTuple):
    """What a task shows of the history and what it asks of the next item, each ``"codes"`` or ``"title"``."""

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
"""How a history begins, and what stands between its items."""
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
    """The tokens of each item, by id; entry 0 is the padding's and empty.

    Args:
        codes: the tokens of the codes.
        titles: of the titles; None where no task needs them.
        descriptions: of the descriptions, empty where an item has none; None where no task needs them.
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
    """Puts the tasks of histories and items together, from tokens that are made once.

    Pieces are encoded one by one, so an instruction has the same tokens whatever follows it. A prompt and its response
    have at most ``cutoff`` tokens together: a response gets half of what the instruction leaves, or more where the
    prompt needs less, and of a history the latest items remain that fit as a whole.

    Args:
        encode: tokens of a text, without special ones.
        end: the token after a response; None where the vocabulary has none.
        cutoff: most tokens of prompt and response.
        levels: codes an item.

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
                f"cutoff={cutoff} tokens do not hold an instruction and the codes of two items, which are {least} with "
                "this tokenizer."
            )

    def next_item(self, history: Sequence[int], items: ItemTokens) -> Tokens:
        """The prompt that asks for the codes of the item after a history, with room for the answer."""
        return self.of_history("next_item", history, None, items).prompt

    def of_history(self, task: Task, history: Sequence[int], target: int | None, items: ItemTokens) -> Example:
        """A task about a history (item ids, oldest first) and the item after it; None leaves room for any codes."""
        form = HISTORY_TASKS[task]
        head, between = self.history[form.shown]
        shown, asked = items.of(form.shown), items.of(form.asked)
        return self._fit(
            head,
            [shown[item] for item in history],
            between,
            self.next[form.asked],
            # All items have as many codes, so any will do to leave room.
            [*asked[target or 1], *self.end],
        )

    def of_item(self, item: int, shown: str, asked: str, items: ItemTokens) -> Example:
        """The task to tell the codes of an item by its title or description, or these by the codes."""
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
    """One of the tasks, all equally likely, by a generator of random numbers or torch's own.

    A task of an item is about any of the catalogue, with its codes on either side, and its title or its description
    where it has one on the other.
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
