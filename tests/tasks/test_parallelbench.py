"""ParallelBench's files are read as they are: prompts, examples and grades by hand on rows in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask import evaluate
from unmask.cli import main
from unmask.sampling.prompts import ChatTokenizer
from unmask.sampling.sampler import Sampler
from unmask.tasks import make_task

LINE = ["Ann Lee", "Ben Day", "Cleo Fox"]
TEXT = '["Ann Lee", "Ben Day", "Cleo Fox"]'
ASK = "The line:\n{context}\nDo it.\n"
NEW = "Dan Orr"
EXAMPLE = {"input": {"context": '["Eve Poe", "Gus Ray"]'}, "answer": '["Gus Ray", "Eve Poe"]'}
ROWS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "waiting_line/reverse": (
        "list_match_score", ASK, {"context": TEXT, "icl_examples": [EXAMPLE]}, '["Cleo Fox", "Ben Day", "Ann Lee"]'
    ),
    "waiting_line/shuffle": (
        "list_shuffle_score", ASK, {"context": TEXT}, {"input": LINE, "example": '["Ben Day", "Ann Lee", "Cleo Fox"]'}
    ),
    "waiting_line/insert_random": (
        "list_random_insert_score", "Add {word}: {context}", {"context": TEXT, "word": NEW},
        {"input": LINE, "word": NEW, "example": '["Dan Orr", "Ann Lee", "Ben Day", "Cleo Fox"]'},
    ),
    "waiting_line/remove_random": (
        "list_random_remove_score", ASK, {"context": TEXT}, {"input": LINE, "example": '["Ann Lee", "Cleo Fox"]'}
    ),
    "waiting_line/replace_random": (
        "list_random_replace_score", "{word} for one of {context}", {"context": TEXT, "word": NEW},
        {"input": LINE, "word": NEW, "example": '["Ann Lee", "Dan Orr", "Cleo Fox"]'},
    ),
    "puzzle/latin_square_n3": (
        "latin_square_score", "{size} of {symbols}", {"size": 3, "symbols": "[A, 7, C]"},
        {"symbols": ["A", "7", "C"], "example": "A,7,C\n7,C,A\nC,A,7"},
    ),
    "puzzle/sudoku_n4_12": ("sudoku_score", r"Fill:\n{sudoku}\nOutput:\n", {"sudoku": "0234\n3412\n2143\n4320"},
        "1234\n3412\n2143\n4321"),
    "words_to_sentence/easy": ("sentence_to_words_score", "Use {words}.", {"words": "dog, park"}, {"words": ["dog"]}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configs: dict[str, Any] = {}
    for subset, (metric, prompt, given, answer) in ROWS.items():
        file = tmp_path / f"{subset}.jsonl"
        file.parent.mkdir(exist_ok=True)
        row = {"input": given, "answer": answer, "metadata": {"length": 3}}
        file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "metadata": {"length": 4}}) + "\n")
        configs.setdefault(file.parent.name, {})[subset] = {"prompt": prompt, "metric": metric, "name": subset}
    for group, entries in configs.items():
        (tmp_path / group / "task_config.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


def of(folder: Path, subset: str, **options: Any) -> Any:
    return make_task("parallelbench", path=str(folder), subset=subset, **options)


GRADES = {
    "waiting_line/reverse": [
        ('["Cleo Fox", "Ben Day", "Ann Lee"]', 1, 1), ('Sure: ["Cleo Fox", "Ben Day", "Ann Lee"].', 1, 1),
        ("Cleo Fox, Ben Day,Ann Lee", 1, 0), ('["Cleo Fox","Ben Day","Ann Lee"]', 1, 0), (TEXT, 0, 0), ("", 0, 0),
        (f'{TEXT} then ["Cleo Fox", "Ben Day", "Ann Lee"]', 1, 1), ('["Cleo Fox", "Ben Day"]', 0, 0),
    ],
    "waiting_line/shuffle": [
        ('["Cleo Fox", "Ben Day", "Ann Lee"]', 1, 1), (TEXT, 0, 0), ('["Ben Day", "Ben Day", "Ann Lee"]', 0, 0),
        ('["Ben Day", "Ann Lee"]', 0, 0),
    ],
    "waiting_line/insert_random": [
        ('["Ann Lee", "Ben Day", "Cleo Fox", "Dan Orr"]', 1, 1), (TEXT, 0, 0),
        ('["Ann Lee", "Dan Orr", "Cleo Fox"]', 0, 0), ('["Ben Day", "Ann Lee", "Cleo Fox", "Dan Orr"]', 0, 0),
        ('["Dan Orr", "Ann Lee", "Ben Day", "Cleo Fox", "Dan Orr"]', 0, 0),
    ],
    "waiting_line/remove_random": [
        ('["Ben Day", "Cleo Fox"]', 1, 1), ('["Ann Lee", "Ben Day"]', 1, 1), ('["Cleo Fox", "Ben Day"]', 0, 0),
        (TEXT, 0, 0), ('["Ann Lee"]', 0, 0), ('["Ann Lee", "Dan Orr"]', 0, 0),
    ],
    "waiting_line/replace_random": [
        ('["Dan Orr", "Ben Day", "Cleo Fox"]', 1, 1), (TEXT, 0, 0), ('["Ann Lee", "Ben Day", "Eve Poe"]', 0, 0),
        ('["Dan Orr", "Dan Orr", "Cleo Fox"]', 0, 0), ('["Ann Lee", "Ben Day", "Cleo Fox", "Dan Orr"]', 0, 0),
    ],
    "puzzle/latin_square_n3": [
        ("7,C,A\nC,A,7\nA,7,C", 1, 1), ("Here:\n7, C, A\n\nC, A, 7\nA, 7, C\nDone", 1, 1),
        ("A,7,C\nA,7,C\nA,7,C", 0, 0), ("A,7,C\n7,C,A", 0, 0), ("A,7,C\n7,C,A\nC,A,A", 0, 0),
    ],
    "puzzle/sudoku_n4_12": [
        ("1234\n3412\n2143\n4321", 1, 1), ("1 2 3 4\n3,4,1,2\n\n2143\n4321", 1, 0), ("1234\n3412\n2143\n4322", 0, 0),
        ("1234\n3412\n2143", 0, 0), ("Solved:\n1234\n3412\n2143\n4321", 1, 0), ("1234 3412 2143 4321", 0, 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("subset", "text", "grade", "strict"), [(s, *row) for s, rows in GRADES.items() for row in rows]
)
def test_grades(folder: Path, subset: str, text: str, grade: float, strict: float) -> None:
    task = of(folder, subset)
    problem = task.problems(1, 0)[0]
    assert task.grade(problem, text) == grade
    assert task.measures(problem, text) == {"strict": strict}
    assert task.grade(problem, problem.response) == 1


def test_the_first_row_of_a_square_may_be_given(folder: Path) -> None:
    subset = "puzzle/latin_square_n3"
    answer = {**ROWS[subset][3], "first_row": ["A", "7", "C"]}
    (folder / f"{subset}.jsonl").write_text(json.dumps({"input": ROWS[subset][2], "answer": answer}))
    task = of(folder, subset)
    problem = task.problems(1, 0)[0]
    assert [task.grade(problem, text) for text in ("A,7,C\n7,C,A\nC,A,7", "7,C,A\nC,A,7\nA,7,C")] == [1, 0]


class Template:
    """A tokenizer with a chat template that writes each message as role and content."""

    chat_template = "yes"

    def encode(self, text: str, **how: Any) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(self, messages: Any, **how: Any) -> list[int]:
        return [ord(c) for c in "".join(f"<{m['role']}>{m['content']}" for m in messages)]


def test_prompts(folder: Path) -> None:
    """The template with the row's input, behind the example, in a chat template as turns."""
    problem = of(folder, "waiting_line/reverse").problems(1, 0)[0]
    first, second = 'The line:\n["Eve Poe", "Gus Ray"]\nDo it.', f"The line:\n{TEXT}\nDo it."
    assert problem.prompt == f'{first}\n\n["Gus Ray", "Eve Poe"]\n\n{second}'
    chat = "".join(map(chr, ChatTokenizer(Template()).encode(problem.prompt)))
    assert chat == f'<user>{first}\n<assistant>["Gus Ray", "Eve Poe"]<user>{second}\n'
    plain = of(folder, "puzzle/sudoku_n4_12").problems(1, 0)[0].prompt
    assert plain == "Fill:\n0234\n3412\n2143\n4320\nOutput:"
    latin = of(folder, "puzzle/latin_square_n3")
    assert latin.phrased("{symbols} at {size}!").problems(1, 0)[0].prompt == "[A, 7, C] at 3!"
    with pytest.raises(ValueError, match="template must have {size}, as 'default' has, got 'All {symbols}!'"):
        latin.phrased("All {symbols}!")
    assert "".join(map(chr, ChatTokenizer(Template(), "Hi").encode("a"))) == "<system>Hi<user>a"


def test_it_is_evaluated_and_trained_on(folder: Path, capsys: Any) -> None:
    """Lines in the words of the packaged model, which reverses them, from the command line."""
    lines = ["Tom, Ann, Eve.", "Gus, Max, Ida, Leo."]
    rows = [(line, ", ".join(line[:-1].split(", ")[::-1]) + ".") for line in lines]
    entry = {"prompt": "Reverse the line: {context}", "metric": "list_match_score"}
    (folder / "waiting_line" / "task_config.yaml").write_text(yaml.safe_dump({"waiting_line/reverse": entry}))
    file = folder / "waiting_line" / "reverse.jsonl"
    file.write_text("".join(json.dumps({"input": {"context": c}, "answer": a}) + "\n" for c, a in rows))
    task = of(folder, "waiting_line/reverse", train_path=str(folder))
    assert sorted(p.answer for p in task.all_problems()) == sorted(a for _, a in rows)
    assert len(task.training_problems(0, 0, 5)) == 5
    assert task.instructions
    row = evaluate(Sampler.from_pretrained("little"), task, 2)
    assert (row.task, row.accuracy, row.measures) == ("parallelbench", 1.0, {"strict": 0.0})
    options = [
        "--task-options", f"path={folder}", "subset=waiting_line/reverse", "--regimes", "full", "--problems", "2",
    ]  # fmt: skip
    assert main(["evaluate", "--task", "parallelbench", *options, "--policies", "threshold:0.9"]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("subset", "error", "message"),
    [
        ("", FileNotFoundError, "has no subset ''; it has puzzle/latin_square_n3, puzzle/sudoku_n4_12, waiting_line/"),
        ("waiting_line/sorted", FileNotFoundError, "has no subset 'waiting_line/sorted'; it has"),
        ("words_to_sentence/easy", ValueError, "'words_to_sentence/easy' is graded by sentence_to_words_score, which"),
    ],
)
def test_subsets_that_are_not_there(folder: Path, subset: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        of(folder, subset)


def test_files_that_are_wrong(folder: Path) -> None:
    with pytest.raises(ValueError, match="parallelbench needs path, the folder"):
        make_task("parallelbench", subset="waiting_line/shuffle")
    with pytest.raises(ValueError, match="no training problems; give a folder of the same layout as train_path"):
        of(folder, "waiting_line/shuffle").training_problems(0, 0, 1)
    file = folder / "waiting_line" / "shuffle.jsonl"
    for row, message in (
        ({"input": {"context": TEXT}}, "line 1: no field 'answer'"),
        ({"input": {}, "answer": ROWS["waiting_line/shuffle"][3]}, "line 1: the input has no 'context', which the tem"),
        (
            {"input": {"context": TEXT}, "answer": {"input": LINE, "example": TEXT}},
            "its own answer is wrong by list_sh",
        ),
        ({"input": {"context": TEXT}, "answer": {"n_words": 2, "example": ""}}, "n_words must be 1, got 2"),
    ):
        file.write_text(json.dumps(row) + "\n" * (1 + len(message) % 7))
        with pytest.raises(ValueError, match=message):
            of(folder, "waiting_line/shuffle").all_problems()
        unread()
    config = folder / "waiting_line" / "task_config.yaml"
    for text, message in (("a: [", "not YAML"), ("a: 1", "'waiting_line/shuffle' must have a prompt and a metric")):
        config.write_text(text)
        unread()
        with pytest.raises(ValueError, match=message):
            of(folder, "waiting_line/shuffle")
    config.unlink()
    unread()
    with pytest.raises(FileNotFoundError, match=r"no file .*task_config.yaml, which has the templates"):
        of(folder, "waiting_line/shuffle")


def unread() -> None:
    """Forget what was read of files, which a program reads once."""
    from unmask.tasks import finite, parallelbench

    finite.load_problems.cache_clear()
    parallelbench.configuration.cache_clear()
