"""Search over the catalogue: questions in plain words, names, misspellings, bad input."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pondera.errors import BadInput
from pondera.papers import Paper, catalogue
from pondera.papers.search import search

_FILE = Path(__file__).with_name("questions.toml")
QUESTIONS: list[dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))["question"]
FLOOR = 28  # of 30; 30 were found when this was written


def keys(query: str, k: int = 5) -> list[str]:
    return [hit.paper.key for hit in search(query, catalogue(), k)]


def test_questions_name_papers_and_rooms_that_exist() -> None:
    rooms = {paper.key: paper.room for paper in catalogue()}
    assert len(QUESTIONS) == 30
    assert all(q["expect"] and set(q["expect"]) <= rooms.keys() for q in QUESTIONS)
    assert {rooms[key] for q in QUESTIONS for key in q["expect"]} == set(rooms.values())


def test_recall_at_5() -> None:
    found = {q["ask"]: set(q["expect"]) & set(keys(q["ask"])) for q in QUESTIONS}
    share = sum(len(found[q["ask"]]) / len(q["expect"]) for q in QUESTIONS) / len(QUESTIONS)
    missed = [ask for ask, hits in found.items() if not hits]
    print(f"recall@5: {30 - len(missed)} of 30 questions, {share:.2f} of the expected keys; missed: {missed}")
    assert 30 - len(missed) >= FLOOR


@pytest.mark.parametrize("paper", catalogue(), ids=lambda paper: paper.key)
def test_a_name_comes_first_however_it_is_written(paper: Paper) -> None:
    key = paper.key
    for name in (key, key.upper(), key.replace("-", " "), key.replace("-", "_"), key.replace("-", ""), paper.title):
        assert keys(name)[0] == key, name
    if paper.arxiv:
        assert keys(paper.arxiv)[0] == key


def test_an_object_finds_its_paper_and_a_key_comes_before_an_object_of_the_same_name() -> None:
    by_key, by_object = (
        Paper(key, "A title", "", 2020, "init", "words", "use", "avoid", (), objects, "")
        for key, objects in [("zero", ()), ("other", ("pondera.init.other.zero_", "pondera.init.other.Start"))]
    )
    assert [hit.paper.key for hit in search("zero_", [by_object, by_key])] == ["zero", "other"]
    for name in ("Start", "pondera.init.other.zero_"):
        assert search(name, [by_key, by_object])[0].paper.key == "other"


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("lsvu", "lsuv"),
        ("Adafcator", "adafactor"),
        ("edge of choas", "edge-of-chaos"),
        ("wieght selection", "weight-selection"),
        ("kolmogrov arnold networks", "kan"),
        ("customise a difusion model from a single foto image", "t-lora"),
    ],
)
def test_misspelt(query: str, key: str) -> None:
    assert key in keys(query)


def test_hyphens_blanks_and_capitals_make_no_difference() -> None:
    for one, other in [("edge-of-chaos", "Edge of Chaos"), ("fine-tune", "fine tune"), ("fine-tune", "finetune")]:
        assert set(keys(one, 3)) & set(keys(other, 3)), (one, other)


@pytest.mark.parametrize("query", ["", " \t\n", "?!"])
def test_a_query_without_words_is_refused(query: str) -> None:
    with pytest.raises(BadInput, match="needs a question or some words"):
        search(query, catalogue())


def test_k_below_one_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one hit, got k=0"):
        search("pruning", catalogue(), k=0)


def test_at_most_k_hits_by_falling_score_and_none_for_an_unknown_word() -> None:
    hits = search("gradient descent", catalogue(), k=7)
    assert len(hits) == 7
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    assert search("qqqqxzzzz", catalogue()) == []
    assert search("pruning", []) == []


def test_the_order_of_the_papers_does_not_matter_and_ties_go_by_key() -> None:
    for question in QUESTIONS[:5]:
        ranked = keys(question["ask"], 195)
        assert ranked == keys(question["ask"], 195)
        assert ranked == [hit.paper.key for hit in search(question["ask"], catalogue()[::-1], 195)]
    twins = [
        Paper(key, "A title", "", 2020, "init", "words", "use", "avoid", ("one",), (), "") for key in ("b", "c", "a")
    ]
    assert [hit.paper.key for hit in search("title", twins)] == ["a", "b", "c"]
