"""Puzzles: the data file's own rules, and grading of explainers that know everything, or nothing."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxplain.configs.explanation import ExplainConfig, ExplainerConfig, PromptConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers import puzzles as module
from jaxplain.explainers.evidence import solved_examples
from jaxplain.explainers.excerpts import unescape
from jaxplain.explainers.local import LocalModel
from jaxplain.explainers.prompts import Message
from jaxplain.explainers.puzzles import grade_puzzles, puzzles
from jaxplain.explainers.replies import Reply
from tests.explainers.faults import text
from tests.explainers.openai_server import openai_server

MARK = re.compile(r"\{\{([^{}|]+)\|(\d+)\}\}")


def config(provider="openai", *, prompt=None, **explainer):
    model = None if provider == "token_table" else "made-up"
    return ExplainConfig(
        store="",
        explainer=ExplainerConfig(provider=provider, model=model, **explainer),
        prompt=prompt or PromptConfig(few_shot="none"),
    )


def grade(config):
    console = Console(width=300, color_system=None)
    return grade_puzzles(config, console)


# The data.


def test_puzzles_are_many_and_various():
    categories = Counter(puzzle.category for puzzle in puzzles())
    assert len(puzzles()) >= 25
    assert len(categories) == 8
    assert min(categories.values()) >= 3
    assert len({puzzle.name for puzzle in puzzles()}) == len(puzzles())
    assert len({puzzle.truth for puzzle in puzzles()}) == len(puzzles())


@pytest.mark.parametrize("puzzle", puzzles(), ids=lambda puzzle: puzzle.name)
def test_a_puzzle_keeps_the_rules(puzzle):
    assert len(puzzle.decoys) == 3
    assert len({puzzle.truth, *puzzle.decoys}) == 4
    assert len(puzzle.excerpts) >= 4
    assert puzzle.quiet
    for excerpt in puzzle.excerpts:
        marks = MARK.findall(excerpt)
        assert any(int(value) >= 5 for _, value in marks), "something is highlighted"
        assert all(1 <= int(value) <= 10 for _, value in marks)
        assert not re.search(r"[{}]{2}|\|\d", MARK.sub("", excerpt)), "no mark that is not one"
    for excerpt in puzzle.quiet:
        assert not re.search(r"\{\{|\}\}|\|\d", excerpt)
    shown = puzzle.shown
    assert len(shown.excerpts) == len(puzzle.excerpts)
    assert len(shown.counterexamples) == len(puzzle.quiet)
    assert not any(e.activations.any() for e in shown.counterexamples)
    assert all(mean > 0 for _, mean in shown.tokens)
    assert re.fullmatch(r"\S.*[^\s.]", puzzle.truth)


def test_few_shot_examples_do_not_give_puzzles_away():
    examples = solved_examples(PromptConfig(few_shot_count=8))
    phrases = {phrase for puzzle in puzzles() for phrase in (puzzle.truth, *puzzle.decoys)}
    assert not {example.explanation for example in examples} & phrases
    texts = {"".join(e.pieces) for puzzle in puzzles() for e in puzzle.shown.excerpts}
    assert not {"".join(e.pieces) for example in examples for e in example.shown.excerpts} & texts


# Grading a model by its choices, behind a server.


def puzzle_of(request):
    """Every puzzle is asked with a seed of its own."""
    return puzzles()[request.body["seed"]]


def options_in(prompt):
    return re.findall(r"^([A-D]): (.*)$", prompt, re.MULTILINE)


def behind_a_server(monkeypatch, choose, explain=lambda puzzle: f"Explanation: {puzzle.truth}", **options):
    """Grades of a model that explains and chooses as told, and what it was sent."""

    def plan(request, _):
        options = options_in(request.prompt)
        return text(choose(options, puzzle_of(request)) if options else explain(puzzle_of(request)))

    monkeypatch.setenv("JAXPLAIN_CACHE", "/nonexistent")
    with openai_server(plan) as server:
        grades = grade(config(base_url=server.url, cache=False, **options))
    return grades, server.requests


def test_who_knows_the_truth_gets_all_right(monkeypatch, capsys):
    def choose(options, puzzle):
        (letter,) = (letter for letter, option in options if option == puzzle.truth)
        return f"**{letter}**"

    grades, requests = behind_a_server(monkeypatch, choose)
    assert [g.puzzle for g in grades] == list(puzzles())
    assert all(g.choice == g.puzzle.truth == g.explanation for g in grades)
    assert len(requests) == 2 * len(puzzles())
    said = capsys.readouterr().out
    assert f"{len(puzzles())} of {len(puzzles())} puzzles right (chance 7.5)" in said
    assert said.count("  right  ") == len(puzzles())
    assert "wrong" not in said
    for category, count in Counter(puzzle.category for puzzle in puzzles()).items():
        assert f"{category}  {count} of {count}\n" in said
    asked = [request for request in requests if options_in(request.prompt)]
    assert len(asked) == len(puzzles())
    for request in asked:
        puzzle, options = puzzle_of(request), options_in(request.prompt)
        assert {option for _, option in options} == {puzzle.truth, *puzzle.decoys}
        assert [letter for letter, _ in options] == list("ABCD")
        assert "".join(puzzle.shown.counterexamples[0].pieces) not in request.prompt
        assert puzzle.shown.excerpts[0].pieces[0] in request.prompt


@pytest.mark.parametrize("letter", "ABCD")
def test_who_always_says_one_letter_is_at_chance(letter):
    right = [module._options(n)["ABCD".index(letter)] == p.truth for n, p in enumerate(puzzles())]
    assert 3 <= sum(right) <= 12


def test_who_says_a_is_graded_so(monkeypatch, capsys):
    grades, _ = behind_a_server(
        monkeypatch, lambda options, puzzle: "A", lambda puzzle: "Explanation: [bold]a guess[/bold]"
    )
    right = [g for g in grades if g.choice == g.puzzle.truth]
    assert [g.choice for g in grades] == [module._options(n)[0] for n in range(len(puzzles()))]
    assert 3 <= len(right) <= 12
    said = capsys.readouterr().out
    assert f"{len(right)} of {len(puzzles())} puzzles right" in said
    assert said.count("  wrong  ") == len(puzzles()) - len(right)
    assert said.count("[bold]a guess[/bold]") == len(puzzles()), "replies are no markup"


def test_answers_that_are_no_letter_are_no_choice(monkeypatch, capsys):
    answers = iter(["E", "", "the second one", "Bank", "all of ABCD", "b"] * 10)
    grades, _ = behind_a_server(monkeypatch, lambda options, puzzle: next(answers), lambda puzzle: "")
    assert all(g.choice is None and g.explanation is None for g in grades)
    said = capsys.readouterr().out
    assert said.count("no explanation") == len(puzzles())
    assert "  -----  " in said
    assert "puzzles right" not in said


def test_one_choice_among_none_is_still_graded(monkeypatch, capsys):
    def choose(options, puzzle):
        return "A" if puzzle == puzzles()[0] else "?"

    grades, _ = behind_a_server(monkeypatch, choose)
    assert [g.choice is None for g in grades] == [False] + [True] * (len(puzzles()) - 1)
    assert re.search(rf"\b[01] of {len(puzzles())} puzzles right", capsys.readouterr().out)


# Grading a model by its likelihoods.


class FakeLocalModel(LocalModel):
    """Explains as told, and finds likely what `likelihood` says."""

    def __init__(self, likelihood):
        self.likelihood = likelihood

    def answers(self, requests):
        for request in requests:
            yield request, Reply(outcome="answered", text=f"Explanation: puzzle {request.index}")

    def log_likelihoods(self, messages, replies):
        assert all(isinstance(m, Message) for one in messages for m in one)
        return np.array(
            [self.likelihood(one[-1].content, reply) for one, reply in zip(messages, replies, strict=True)],
            np.float32,
        )


def grade_local(monkeypatch, likelihood, prompt=None):
    monkeypatch.setattr(module, "open_model", lambda *_, **__: FakeLocalModel(likelihood))
    return grade(config("local", prompt=prompt))


@pytest.mark.parametrize("style", ["highlighted", "contrastive", "token_list"])
def test_the_likelier_of_four_by_what_the_evidence_adds(monkeypatch, style):
    def likelihood(shown, reply):
        phrase = reply.removeprefix("Explanation: ")
        assert phrase != reply
        found = [p for p in puzzles() if phrase in (p.truth, *p.decoys)]
        popular = -len(phrase) / 10  # long phrases are unlikely with evidence and without
        seen = any(p.truth == phrase and marked(p, shown) for p in found)
        return popular + (0.1 if seen else 0.0)

    def marked(puzzle, shown):
        return puzzle.shown.tokens[0][0].strip() in unescape(shown)

    grades = grade_local(monkeypatch, likelihood, PromptConfig(style=style, few_shot="none"))
    assert all(g.choice == g.puzzle.truth for g in grades)
    assert [g.explanation for g in grades] == [f"puzzle {n}" for n in range(len(puzzles()))]


def test_whose_likelihoods_know_nothing_is_at_chance(monkeypatch, capsys):
    rng = np.random.default_rng(0)
    grades = grade_local(monkeypatch, lambda shown, reply: -rng.random())
    right = sum(g.choice == g.puzzle.truth for g in grades)
    assert 2 <= right <= 14
    assert f"{right} of {len(puzzles())} puzzles right (chance 7.5)" in capsys.readouterr().out


# Others.


def test_token_tables_are_shown_without_a_grade(capsys):
    grades = grade(config("token_table", prompt=PromptConfig(tokens=2)))
    assert all(g.choice is None for g in grades)
    by_name = {g.puzzle.name: g.explanation for g in grades}
    assert by_name["even-numbers"] == 'tokens such as " 12", " 14"'
    said = capsys.readouterr().out
    assert f"{len(puzzles())} puzzles; this explainer has no likelihood to be graded by" in said
    assert said.count("  -----  ") == len(puzzles())
    assert "  right  " not in said
    assert "puzzles right" not in said


def test_both_signs_are_refused():
    with pytest.raises(JaxplainError, match="puzzles have one sign; use highlighted"):
        grade(config("token_table", prompt=PromptConfig(style="highlighted_both_signs")))


def test_the_file_is_plain_yaml():
    """No field is missing, or there and unknown."""
    text = (module.importlib.resources.files("jaxplain.explainers") / "puzzles.yaml").read_text("utf-8")
    fields = {"name", "category", "truth", "decoys", "excerpts", "quiet"}
    assert all(set(entry) == fields for entry in yaml.safe_load(text))
