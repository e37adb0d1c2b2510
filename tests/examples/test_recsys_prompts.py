"""The texts of MiniOneRec's tasks, and their truncation."""

from __future__ import annotations

import pytest

from examples.recsys.models.prompts import HISTORY_TASKS, ItemTokens, PromptWriter, draw_example

NUM_ITEMS, LEVELS, END = 40, 3, ord("$")


def encode(text: str) -> list[int]:
    return list(map(ord, text))


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def written(item: int) -> str:
    """Codes of an item: three characters outside the alphabet; the last one is unique."""
    return chr(0x2400) + chr(0x2401) + chr(0x2500 + item)


def new_writer(cutoff: int) -> PromptWriter:
    return PromptWriter(encode, END, cutoff, LEVELS)


WRITER = new_writer(10_000)
ITEMS = ItemTokens(
    codes=[[], *(encode(written(item)) for item in range(1, NUM_ITEMS + 1))],
    titles=[[], *(encode(f"Thing {item}") for item in range(1, NUM_ITEMS + 1))],
    descriptions=[[], *(encode(f"Rather {item}-ish.") if item % 2 else [] for item in range(1, NUM_ITEMS + 1))],
)


class TestTasks:
    CODES_SHOWN = f"A shopper took these items, the latest last:\n{written(3)}, {written(1)}, {written(4)}"
    TITLES_SHOWN = "A shopper took items with these titles, the latest last:\nThing 3\nThing 1\nThing 4"

    @pytest.mark.parametrize(
        ("task", "prompt", "response"),
        [
            ("next_item", f"{CODES_SHOWN}\nThe next item is:\n", written(5)),
            ("fusion", f"{CODES_SHOWN}\nThe title of the next item is:\n", "Thing 5"),
            ("titles", f"{TITLES_SHOWN}\nThe title of the next item is:\n", "Thing 5"),
            ("titles_to_codes", f"{TITLES_SHOWN}\nThe next item is:\n", written(5)),
        ],
    )
    def test_of_histories_say_what_they_should(self, task, prompt, response):
        example = draw_example([task], WRITER, [3, 1, 4], 5, ITEMS)
        assert decode(example.prompt) == prompt
        assert decode(example.response) == f"{response}$"

    def test_of_items_are_about_every_item_in_all_directions(self):
        expected = set()
        for item in range(1, NUM_ITEMS + 1):
            texts = {"title": f"Thing {item}"} | ({"description": f"Rather {item}-ish."} if item % 2 else {})
            for kind, text in texts.items():
                expected.add((f"This is an item:\n{written(item)}\nIts {kind} is:\n", f"{text}$"))
                expected.add((f"This is the {kind} of an item:\n{text}\nThe item is:\n", f"{written(item)}$"))
        examples = [draw_example(["item_text"], WRITER, [1], 2, ITEMS) for _ in range(1_500)]
        assert {tuple(map(decode, example)) for example in examples} == expected

    def test_are_drawn_alike(self):
        drawn = [draw_example([*HISTORY_TASKS, "item_text"], WRITER, [3, 1], 4, ITEMS) for _ in range(2_000)]
        starts = [decode(prompt)[:36] for prompt, _ in drawn]
        # Items have prompts of their own; of the other four tasks two show codes, and two titles.
        shares = [sum(start.startswith(head) for start in starts) / 2_000 for head in ("This", "A shopper took these")]
        assert shares == pytest.approx([0.2, 0.4], abs=0.04)

    @pytest.mark.parametrize("cutoff", [100, 120, 150])
    @pytest.mark.parametrize("task", ["next_item", "fusion", "titles", "titles_to_codes"])
    def test_the_oldest_items_go_first(self, task, cutoff):
        writer = new_writer(cutoff)
        history = list(range(1, 31))
        for length in range(1, 31):
            shown = history[-length:]
            whole = WRITER.of_history(task, shown, 31, ITEMS)
            if length > 1 and len(whole.prompt) + len(whole.response) > cutoff:
                break
            kept = whole
        example = writer.of_history(task, history, 31, ITEMS)
        if len(kept.prompt) + len(kept.response) <= cutoff:
            assert example == kept
        assert len(example.prompt) + len(example.response) <= cutoff

    def test_long_texts_are_cut_at_their_end(self):
        writer = new_writer(110)
        titles = [[], *([65 + item] * 300 for item in range(NUM_ITEMS))]
        items = ItemTokens(ITEMS.codes, titles, [[] for _ in titles])
        prompt, response = writer.of_history("titles", [1, 2], 3, items)
        assert len(prompt) + len(response) == 110
        head, _ = writer.history["title"]
        room = 110 - len(head) - len(writer.next["title"])
        assert response == [67] * ((room + 1) // 2)
        assert prompt == [*head, *[66] * (room // 2), *writer.next["title"]]
        prompt, response = writer.of_item(5, "codes", "title", items)
        assert prompt == [*writer.subject["codes"], *items.codes[5], *writer.question["title"]]
        assert response == [69] * (110 - len(prompt))


def test_a_cutoff_without_room_gets_a_sentence():
    with pytest.raises(ValueError, match="cutoff=60 tokens do not hold an instruction and the codes of two items"):
        new_writer(60)


def test_texts_that_are_not_there_get_a_sentence():
    with pytest.raises(RuntimeError, match=r"takes them from its data in setup\(\)"):
        WRITER.of_history("titles", [1], 2, ItemTokens(ITEMS.codes))
