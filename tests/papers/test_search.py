"""Search over the catalogue: questions in plain words, names, misspellings, bad input."""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pondera.errors import BadInput
from pondera.papers import Paper, catalogue
from pondera.papers.search import search

_FILE = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
QUESTIONS: list[dict[str, Any]] = _FILE["question"]
EARLIER: list[dict[str, Any]] = _FILE["earlier"]
FLOOR = 28  # of the 30 earlier ones; 30 were found when this was written


def keys(query: str, k: int = 5) -> list[str]:
    return [hit.paper.key for hit in search(query, catalogue(), k)]


def test_questions_name_papers_and_rooms_that_exist() -> None:
    rooms = {paper.key: paper.room for paper in catalogue()}
    assert len(EARLIER) == 30
    assert all(q["expect"] and set(q["expect"]) <= rooms.keys() for q in EARLIER + QUESTIONS)
    assert {rooms[key] for q in EARLIER for key in q["expect"]} == set(rooms.values())
    assert Counter(q["split"] for q in QUESTIONS) == {"tune": 30, "held-out": 30}
    assert Counter(q["kind"] for q in QUESTIONS) == {"symptom": 30, "question": 30}
    assert len({q["ask"] for q in QUESTIONS}) == 60


@pytest.mark.parametrize("split", ["tune", "held-out"])
def test_recall_at_3(split: str) -> None:
    asked = [q for q in QUESTIONS if q["split"] == split]
    missed = [q["ask"] for q in asked if not set(q["expect"]) & set(keys(q["ask"], 3))]
    print(f"recall@3 on {split}: {len(asked) - len(missed)} of {len(asked)}")
    assert 1 - len(missed) / len(asked) >= 0.9, missed


def test_recall_at_5_on_the_earlier_questions() -> None:
    missed = [q["ask"] for q in EARLIER if not set(q["expect"]) & set(keys(q["ask"]))]
    assert len(EARLIER) - len(missed) >= FLOOR, missed


@pytest.mark.parametrize(
    ("query", "expect"),
    [
        ("my deep network does not train", {"lsuv"}),
        ("loss becomes NaN after a while", {"weight-rescaling", "why-decay"}),
        ("my network loses its ability to learn after many tasks", {"spectral-continual"}),
    ],
)
def test_the_queries_of_the_documents_put_the_right_row_first(query: str, expect: set[str]) -> None:
    assert keys(query)[0] in expect


def test_a_symptom_in_the_very_words_of_a_row_puts_it_first() -> None:
    for paper in catalogue():
        assert paper.symptoms, paper.key
        for said in paper.symptoms:
            assert keys(said.upper())[0] == paper.key, (paper.key, said)


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
