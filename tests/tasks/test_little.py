"""The worded tasks of the packaged model ``little``: splits, phrasings, and graders against answers written by hand."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from unmask.tasks import LITTLE, Problem, make_task
from unmask.tasks.constrained import squares
from unmask.tasks.words import WordedTask


def grades(name: str, metadata: dict[str, object], answer: str, completions: list[str]) -> list[float]:
    return [make_task(name).grade(Problem("", answer, "", metadata), c) for c in completions]


@pytest.mark.parametrize("name", sorted(LITTLE))
def test_problems_are_solved_by_their_responses_and_splits_share_none(name: str) -> None:
    drawn = {}
    for split in ("train", "validation", "test"):
        task: WordedTask = LITTLE[name](split=split, template=0)
        problems = task.problems(300, seed=1)
        assert problems == task.problems(300, seed=1) != task.problems(300, seed=2)
        assert all(task.grade(p, p.response) == 1.0 for p in problems)
        assert not any(task.grade(p, c) for p in problems for c in ("", p.response + " x", p.response[:-1]))
        drawn[split] = {p.prompt for p in problems}
    assert not drawn["test"] & drawn["validation"]
    assert not drawn["train"] & (drawn["test"] | drawn["validation"])
    stream = LITTLE[name](template=0).training_problems(5, 10, 300)  # whatever the split of the task itself
    assert stream[7:] == LITTLE[name](template=0).training_problems(5, 17, 293)
    assert not {p.prompt for p in stream} & (drawn["test"] | drawn["validation"])


@pytest.mark.parametrize("name", sorted(LITTLE))
def test_phrasings(name: str) -> None:
    contents = [LITTLE[name](template=t).problems(5, seed=3) for t in range(len(LITTLE[name].TEMPLATES))]
    assert all({p.metadata["template"] for p in problems} == {t} for t, problems in enumerate(contents))
    assert len({problems[0].prompt for problems in contents}) == len(contents)
    mixed = {p.metadata["template"] for p in LITTLE[name]().problems(200, seed=3)}
    assert mixed == set(range(len(LITTLE[name].TEMPLATES) - 1)), "the last phrasing is held out"
    with pytest.raises(ValueError, match="template must be None or 0 to 4, got 5"):
        make_task(name, template=5)
    with pytest.raises(ValueError, match="split must be one of test, validation, train, got 'dev'"):
        make_task(name, split="dev")


@pytest.mark.parametrize("name", ["story", "parcel"])
def test_the_last_answer_counts(name: str) -> None:
    right = ["Answer: 9.", "7 + 5 = 12. 12 - 3 = 9. Answer: 9.", "Answer: 8. Answer: 9."]
    wrong = ["9", "9.", "Answer: 9", "Answer: 8.", "Answer: 9. Answer: 8.", "Answer: 9. 8.", "Answer:  9."]
    assert grades(name, {}, "9", right + wrong) == [1.0] * 3 + [0.0] * 7
    assert make_task(name).measures(Problem("", "9"), right[1]) == {"reasons": 1.0}
    assert make_task(name).measures(Problem("", "9"), right[0]) == {"reasons": 0.0}


def test_stories_and_parcels_follow_from_their_prompts() -> None:
    for p in make_task("story", shortcut=0.0, asides=0.0).problems(200, seed=4):
        changes = re.findall(r"(buys|finds|gets|gives|loses|sells) (\d+)", p.prompt)
        total, steps = int(re.search(r"has (\d+)", p.prompt)[1]), ""  # type: ignore[index]
        for verb, amount in changes:
            sign = "+" if verb in ("buys", "finds", "gets") else "-"
            before, total = total, total + int(f"{sign}{amount}")
            steps += f"{before} {sign} {amount} = {total}. "
        assert p.response == f"{steps}Answer: {total}."
    for p in make_task("parcel", shortcut=0.0).problems(200, seed=4):
        gives = dict(re.findall(r"(\w+) gives to (\w+)", p.prompt))
        at = re.search(r"(\w+) has the parcel|(?:starts with|Now) (\w+)", p.prompt) or re.search(
            r"(\w+) has it now", p.prompt
        )
        person, way = next(filter(None, at.groups())), ""  # type: ignore[union-attr]
        while person in gives:
            way, person = f"{way}{person} to {gives[person]}. ", gives[person]
        assert p.response == f"{way}Answer: {person}."


PEOPLE = ["Tom", "Ann", "Eve"]
LINES = {
    "reverse": (["Eve, Ann, Tom."], ["Tom, Ann, Eve.", "Eve, Ann.", "Eve, Ann, Tom"]),
    "shuffle": (["Eve, Ann, Tom.", "Ann, Tom, Eve."], ["Tom, Ann, Eve.", "Ann, Eve.", "Ann, Ann, Eve."]),
    "insert": (["Kim, Tom, Ann, Eve.", "Tom, Ann, Kim, Eve."], ["Tom, Ann, Eve.", "Kim, Ann, Tom, Eve."]),
    "remove": (["Tom, Ann.", "Ann, Eve.", "Tom, Eve."], ["Ann, Tom.", "Tom.", "Tom, Ann, Eve."]),
    "replace": (["Kim, Ann, Eve.", "Tom, Ann, Kim."], ["Tom, Ann, Eve.", "Ann, Kim, Eve.", "Kim, Kim, Eve."]),
}  # fmt: skip


@pytest.mark.parametrize("order", sorted(LINES))
def test_any_line_that_fits_counts(order: str) -> None:
    right, wrong = LINES[order]
    metadata = {"order": order, "people": PEOPLE, "person": "Kim"}
    assert grades("line", metadata, "Eve, Ann, Tom.", right + wrong) == [1.0] * len(right) + [0.0] * len(wrong)


def test_lines_of_one_order() -> None:
    assert all(p.prompt.startswith("Line:") for p in make_task("line", template=0, order="sort").problems(9, 0))
    problem = make_task("line", order="without", template=2).sample(random.Random(1))
    gone, people = re.match(r"Remove (\w+) from the line. The line is (.*)\.", problem.prompt).groups()  # type: ignore[union-attr]
    assert problem.answer == ", ".join(p for p in people.split(", ") if p != gone) + "."
    with pytest.raises(ValueError, match="order must be None or one of copy, reverse, .*, got 'turn'"):
        make_task("line", order="turn")


def test_any_different_words_with_the_letters_count() -> None:
    metadata = {"kind": "animals", "letters": "b, c, b"}
    right = ["bear, cat, bee.", "bee, cow, bear."]
    wrong = [
        "bear, cat, bear.",
        "bear, bee, cat.",
        "bear, cat.",
        "bread, cat, bee.",
        "bear, cat, bee, bat.",
        "bear cat bee.",
    ]
    assert grades("letters", metadata, right[0], right + wrong) == [1.0] * 2 + [0.0] * 6


def test_squares_that_keep_clues_and_rules_count() -> None:
    assert [len(squares(n, False)) for n in (2, 3, 4)] == [2, 12, 576]
    assert len(squares(4, True)) == 288
    clues = [["red", "_", "_"], ["_", "_", "_"], ["_", "_", "blue"]]
    right = ["red blue gold / blue gold red / gold red blue", "red gold blue / gold blue red / blue red gold"]
    metadata = {"clues": clues, "symbols": ["red", "blue", "gold"]}
    wrong = [
        "blue red gold / red gold blue / gold blue red",
        "red blue gold / blue red gold / gold gold blue",
        "red blue gold",
    ]
    assert grades("latin", metadata, "", right[:1]) == [1.0]
    assert grades("latin", metadata, "", [right[1], *wrong, right[0] + " /", right[0].replace(" / ", " ")]) == [0.0] * 6
    metadata = {"clues": [["1", "_", "_", "_"]] + [["_"] * 4] * 3, "symbols": list("1234")}
    latin = "1 2 3 4 / 2 1 4 3 / 3 4 1 2 / 4 3 2 1"
    grid = "1 2 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1"
    assert grades("latin", metadata, "", [latin, grid]) == [1.0, 1.0]
    assert grades("grid", metadata, "", [latin, grid, grid.replace("1", "5")]) == [0.0, 1.0, 0.0]


def test_independent_parts_follow_from_their_prompts() -> None:
    problem = make_task("gaps", template=0).sample(random.Random(0))
    shown, series = re.findall(r"\d+|_", problem.prompt), problem.answer[:-1].split(", ")
    assert all(s in ("_", n) for s, n in zip(shown, series, strict=True))
    assert len({int(b) - int(a) for a, b in pairwise(series)}) == 1
    form = make_task("form", template=0).sample(random.Random(0))
    told, fields = form.prompt.split(" Fill the form: ")
    assert re.findall(r"(\w+):", form.answer) == fields[:-1].split(", ")
    assert all(value in told for value in re.findall(r": (\w+)", form.answer))
    for p in make_task("quiz", template=3).problems(50, seed=0):
        sums = re.findall(r"(\d+): (\d+) ([+-]) (\d+)\?", p.prompt)
        assert all(f"{i}: {int(a) + int(sign + b)}." in p.answer for i, a, sign, b in sums)
        mores = re.findall(r"(\d+): more of (\d+) and (\d+)\?", p.prompt)
        assert all(f"{i}: {max(int(a), int(b))}." in p.answer for i, a, b in mores)
