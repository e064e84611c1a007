"""The page that plays a decoding: its data replays to the completion, and a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import GenerationResult, Sampler, SamplerConfig, load_model
from unmask.cli import main
from unmask.plots.trace import page
from unmask.sampling.trace import Words, trace_data
from unmask.testing import write_checkpoint

PROMPTS = ["cEaCfBeGgD:a=", "bC:a="]


def decoded(policy: str, prompts: Any = PROMPTS, block: int | None = 8, **settings: Any) -> GenerationResult:
    sampler = Sampler.from_pretrained("tiny", policy, config=SamplerConfig(24, block, seed=0, record=True))
    return sampler.generate(prompts, **settings)


def read(text: str) -> Any:
    return json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])


def replay(run: dict[str, Any]) -> dict[int, int]:
    """Places and words after all events; only holes are filled and only what is filled is revised."""
    tokens = dict(run["given"])
    for events in run["steps"]:
        for place, *_ in events.get("reject", []):
            assert place not in tokens
        for kind in ("commit", "fill", "revise"):
            for place, word, *_ in events.get(kind, []):
                assert (place in tokens) == (kind == "revise"), (kind, place)
                tokens[place] = word
    return tokens


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("threshold:0.9", {}),
        ("tiny", {"block": None}),
        ("threshold:0.6,edit=0.6", {}),
        ("random:24", {"temperature": 2.0, "block": 5}),
        ("tiny", {"actions": "dpls", "block": None, "stop_at_eos": False}),
        ("confidence:24", {"max_steps": 6}),
    ],
)
def test_events_replay_to_the_completion(policy: str, settings: dict[str, Any]) -> None:
    result = decoded(policy, **settings)
    data, names = trace_data([result], range(2)), Words(result.origin.tokenizer)  # type: ignore[union-attr]
    for row, prompt in enumerate(data["prompts"]):
        (run,) = prompt["runs"]
        assert "".join(data["words"][word] for word in prompt["prompt"]) == PROMPTS[row]
        assert result.forwards is not None
        assert len(run["steps"]) == int(result.forwards[row])
        final = [names.text(token) for token in result.completions[row].tolist()]
        written = {place: data["words"][word] for place, word in replay(run).items()}
        assert written == {place: text for place, text in enumerate(final) if text != "<mask>"}
        assert run["edges"] == list(range(0, 24, settings.get("block", 8) or 24))
        revised = [event for events in run["steps"] for event in events.get("revise", [])]
        assert bool(revised) <= ("edit" in policy)
    orders = [e for events in data["prompts"][0]["runs"][0]["steps"] for e in events.get("commit", []) if e[3:]]
    assert bool(orders) == (settings.get("actions") == "dpls")
    if "edit" in policy:
        assert any("revise" in events for prompt in data["prompts"] for events in prompt["runs"][0]["steps"])
    if "max_steps" in settings:
        assert "unfinished" in run["summary"]


def test_seeds_of_blocks_are_no_choice_of_the_policy(tmp_path: Path) -> None:
    write_checkpoint("nemotron", tmp_path)
    sampler = Sampler(load_model(tmp_path), policy="threshold:0.02", config=SamplerConfig(19, 4, record=True))
    result = sampler.generate([[5, 6, 7]])
    (run,) = trace_data([result], [0])["prompts"][0]["runs"]
    seeds = [place for events in run["steps"] for place, *_ in events.get("fill", [])]
    assert seeds == [0, 4, 8, 12, 16]
    assert sorted(replay(run)) == list(range(19))
    assert len(run["steps"]) == int(result.steps[0])
    assert f"and {result.forwards[0] - result.steps[0]} other forwards" in run["summary"]  # type: ignore[index]


def test_rejected_proposals_are_those_that_the_rule_left() -> None:
    (prompt,) = trace_data([decoded("threshold:0.9")], [0])["prompts"]
    first = prompt["runs"][0]["steps"][0]
    assert sorted(place for kind in first for place, *_ in first[kind]) == list(range(8))
    assert all(confidence <= 0.9 for _, _, confidence in first["reject"])
    taken = [confidence for _, _, confidence in first["commit"]]
    assert min(taken) > 0.9 or len(taken) == 1


def test_infill_with_padding_shows_what_was_given() -> None:
    sampler = Sampler.from_pretrained("tiny", "threshold:0.9", config=SamplerConfig(24, 8, record=True))
    mask = sampler.model.mask_token_id
    ids = torch.tensor([[0, 0, 5, mask, 7], [9, mask, mask, 8, 7]])
    result = sampler.infill(ids, attention_mask=ids != 0)
    data = trace_data([result], range(2))
    words = Words(sampler.tokenizer)
    for row, places in enumerate(([0, 2], [0, 3, 4])):
        run = data["prompts"][row]["runs"][0]
        assert [place for place, _ in run["given"]] == places
        shown = [data["words"][word] for _, word in sorted(replay(run).items())]
        assert shown == [words.text(token) for token in result.completions[row].tolist()[2 * (1 - row) :]]


class Pieces:
    """A tokenizer whose tokens are awkward to show."""

    texts = (" word", "</script><img src=x onerror=alert(1)>", "\x1b[31m\u202e", "\ufffd", "\n")

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.texts[i] for i in ids).removeprefix(" ")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"Ã{i}" for i in ids]


def test_texts_are_data_and_never_markup() -> None:
    words = Words(Pieces())
    texts = [words.text(i) for i in range(5)]
    assert texts == [" word", "</script><img src=x onerror=alert(1)>", "\\x1b[31m\\u202e", "Ã3", "\n"]
    assert Words(None).text(7) == "7 "
    whole = page({"words": texts, "prompts": []})
    assert read(whole)["words"] == texts
    assert "<img" not in whole
    assert "http" not in whole.replace("http-equiv", "")


def test_results_without_a_recording_say_how_to_get_one() -> None:
    result, plain = decoded("threshold:0.9"), decoded("threshold:0.9", record=False)
    with pytest.raises(ValueError, match=r"not recorded: decode with record=True"):
        plain.show(0)
    with pytest.raises(ValueError, match=r"row must be from 0 to 1, got 2"):
        result.show(2)
    with pytest.raises(ValueError, match="row 0: the results are of different prompts"):
        result.show(0, decoded("threshold:0.9", PROMPTS[::-1]))
    assert plain._repr_html_() is None
    assert plain.origin is None


def test_notebook_and_browser_get_the_same_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, opened = decoded("threshold:0.9"), list[Any]()
    result.to_html(tmp_path / "page.html")
    whole = (tmp_path / "page.html").read_text()
    shown = result._repr_html_()
    assert shown is not None
    assert html.unescape(shown.partition('srcdoc="')[2].removesuffix('"></iframe>')) == whole
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result.show()
    assert Path(opened.pop().removeprefix("file://")).read_text() == whole
    display = types.SimpleNamespace(display=lambda shown, raw: opened.append(shown["text/html"]))
    for name, module in (("ipykernel", display), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    result.show(1, decoded("tiny", block=None))
    runs = read(html.unescape(opened.pop()))["prompts"][0]["runs"]
    assert [run["policy"] for run in runs] == ["threshold:0.9", "tiny, alpha 1"]


def test_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "page.html")
    words = ["--model", "tiny", "--policy", "tiny", "--policy", "factor:1", "--alpha", "3", "--output"]
    assert main(["trace", *PROMPTS, *words, path]) == 0
    prompts = read(Path(path).read_text())["prompts"]
    assert [[run["policy"] for run in prompt["runs"]] for prompt in prompts] == [["tiny, alpha 3", "factor:1.0"]] * 2
    for words, message in (
        (["--alpha", "3", "--policy", "factor:1", "--output", path], "none of the policies is conditioned"),
        (["--output", str(tmp_path / "no" / "page.html")], "cannot be written"),
        (["--policy", "factor:x", "--output", path], "is not a number"),
    ):
        assert main(["trace", "a", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def browser() -> Any:
    """A headless browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def test_page_plays_in_a_browser(browser: Any, tmp_path: Path) -> None:
    result, other = decoded("tiny", block=None), decoded("threshold:0.6,edit=0.6")
    path = tmp_path / "page.html"
    result.to_html(path, None, other)
    colours = []
    for scheme, width in (("light", 1100), ("dark", 390)):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        sheet, wrong, asked = context.new_page(), list[Any](), list[Any]()
        for event in ("pageerror", "console"):
            sheet.on(event, lambda what, wrong=wrong: wrong.append(str(what)))
        sheet.on("request", lambda request, asked=asked: asked.append(request.url))
        sheet.goto(path.as_uri())
        texts = sheet.locator(".text")
        assert texts.count() == 2
        final = texts.nth(0).text_content().replace("·", "")
        assert final == PROMPTS[0] + result.texts[0]  # type: ignore[index]
        sheet.evaluate("slider.value = 0; slider.oninput()")
        assert sheet.locator(".hole").count() == 2 * 24 + 1  # one is in the key
        sheet.evaluate("show(1)")
        tried = sheet.locator(".tried").last
        tried.hover()
        assert re.search(r'forward 1: ".+" 0\.\d{3} not taken$', sheet.locator("#tip").text_content())
        sheet.click("#play")
        sheet.get_by_role("button", name="Play", exact=True).wait_for()
        assert texts.nth(0).text_content().replace("·", "") == final
        assert sheet.locator(".text .revised").count() > 0
        sheet.select_option("#prompt", "1")
        assert texts.nth(1).text_content().startswith(PROMPTS[1])
        assert sheet.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours.append(sheet.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert not wrong
        assert asked == [path.as_uri()]
        context.close()
    assert len(set(colours)) == 2


CELLS = (
    "from unmask import Sampler",
    'sampler = Sampler.from_pretrained("tiny")\nout = sampler.generate("bC:a=", record=True)',
    "out.show()",
    "out",
    'sampler.generate("bC:a=")',
)


def test_a_notebook_shows_the_page(browser: Any) -> None:
    """Jupyter runs the cells; what it shows plays in a browser, in the frame that keeps it apart from the notebook."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    ((shown,), (value,), (plain,)) = ([output.data for output in cell.outputs] for cell in notebook.cells[2:])
    assert shown["text/html"] == value["text/html"]
    assert value["text/plain"].startswith("GenerationResult(1 x 24 tokens, 1 finished")
    assert list(plain) == ["text/plain"]
    sheet, wrong = browser.new_page(), list[Any]()
    sheet.on("pageerror", lambda what: wrong.append(str(what)))
    sheet.set_content(f"<h1>notebook</h1>{shown['text/html']}")
    (frame,) = [frame for frame in sheet.frames if frame.parent_frame]
    frame.wait_for_selector("text=forward")
    assert "bC:a=" in frame.inner_text("body")
    assert not wrong
