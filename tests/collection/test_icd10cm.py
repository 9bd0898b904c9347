"""Questions built from ICD-10-CM: splits that share nothing, titles that stand alone, readable records."""

import json
from collections import Counter

import pytest

from umedtrain.collection import icd10cm
from umedtrain.evaluation.extraction import extract_answer
from umedtrain.records import read_conversations, read_prompts

pytest.importorskip("simple_icd_10_cm", reason="the extra `demo` is not installed")

SIZES = {"sft": 300, "preference": 600, "online": 200, "validation": 150, "test": 150}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("icd10cm")
    return directory, icd10cm.build(directory, seed=3, sizes=SIZES)


@pytest.fixture(scope="module")
def titles():
    return icd10cm.usable_titles()


def rows_of(directory, split):
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def category_of(row):
    return row["id"].removeprefix("ICD-10-CM,").split("-")[0].split(".")[0]


def test_no_category_stands_in_two_splits(built):
    directory, _ = built
    seen = Counter()
    for split, size in SIZES.items():
        rows = rows_of(directory, split)
        assert len(rows) == size
        seen.update({category_of(row) for row in rows})
    assert len(seen) > 300
    assert set(seen.values()) == {1}


def test_no_title_is_asked_twice(built):
    directory, _ = built
    ids = Counter(row["id"] for split in SIZES for row in rows_of(directory, split))
    assert set(ids.values()) == {1}


def test_answers_are_the_chapters_of_the_codes(built):
    import simple_icd_10_cm as icd

    directory, _ = built
    for split in ("sft", "test"):
        for row in rows_of(directory, split):
            chapter = int(icd.get_ancestors(category_of(row))[-1])
            human, gpt = row["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert row["answer"] == icd10cm.LABELS[chapter]
            assert gpt["value"] == f"So, the answer is {row['answer']}."
            assert extract_answer(gpt["value"]) == row["answer"]


def test_online_rows_hold_no_answer(built):
    directory, _ = built
    for row in rows_of(directory, "online"):
        assert [turn["from"] for turn in row["conversations"]] == ["human"]
        assert row["answer"] is None
    assert len(read_prompts(directory / "online.jsonl")) == SIZES["online"]


def test_the_records_can_be_read(built):
    directory, _ = built
    for split in ("sft", "preference", "validation", "test"):
        assert len(read_conversations(directory / f"{split}.jsonl")) == SIZES[split]


def test_chapters_are_even_where_they_can_be(built):
    directory, card = built
    for split in SIZES:
        counts = Counter(row["answer"] for row in rows_of(directory, split))
        if split == "online":
            continue
        assert card["splits"][split]["chapters"] == {label: counts[label] for label in icd10cm.LABELS.values()}
        assert max(counts.values()) / SIZES[split] == pytest.approx(
            card["splits"][split]["majority_class_share"], abs=1e-4
        )
    even = card["splits"]["preference"]["chapters"].values()
    assert max(even) - min(even) <= 1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(built, tmp_path):
    directory, card = built
    assert icd10cm.build(tmp_path / "again", seed=3, sizes=SIZES) == card
    icd10cm.build(tmp_path / "other", seed=4, sizes=SIZES)
    for name in [f"{split}.jsonl" for split in SIZES] + ["card.json"]:
        content = (directory / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        assert (tmp_path / "other" / name).read_bytes() != content


def test_the_card_states_source_and_version(built):
    directory, card = built
    assert json.loads((directory / "card.json").read_text(encoding="utf-8")) == card
    assert card["package"].startswith("simple-icd-10-cm 1.")
    for word in ("CDC/NCHS", "CMS", "World Health"):
        assert word in card["source"]


def test_titles_stand_alone(titles):
    import simple_icd_10_cm as icd

    usable, dropped = titles
    assert len(usable) > 20_000
    assert all(count > 0 for count in dropped.values())
    texts = [title.text.lower() for title in usable]
    assert len(set(texts)) == len(texts)
    for title in usable:
        assert len(title.text) <= icd10cm.MAX_TITLE_CHARACTERS
        assert title.code[:3] == title.category
        if title.text == icd.get_description(title.code) and title.code != title.category:
            shared = icd10cm.content_words(title.text) & icd10cm.content_words(icd.get_description(title.category))
            assert shared, title


def test_titles_that_differ_in_side_only_are_kept_once(titles):
    usable, _ = titles
    hordeolum = [title.text for title in usable if title.text.startswith("Hordeolum externum")]
    assert len(hordeolum) == len({text.replace("right", "").replace("left", "") for text in hordeolum})


def test_labels_are_single_different_words():
    assert len(set(icd10cm.LABELS.values())) == len(icd10cm.LABELS) == 21
    assert all(label.isalpha() for label in icd10cm.LABELS.values())


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"sizes": {**SIZES, "sft": 100_000}}, "sizes['sft'] is 100000"),
        ({"sizes": {**SIZES, "test": 0}}, "sizes['test'] is 0"),
        ({"sizes": {"sft": 1}}, "must name the same splits"),
        ({"shares": {**icd10cm.SHARES, "test": 0.5}}, "must not exceed 1"),
        ({"shares": {**icd10cm.SHARES, "test": 0}}, "shares['test'] is 0"),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(tmp_path, changed, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("]", r"\]")):
        icd10cm.build(tmp_path, seed=0, **{"sizes": SIZES, **changed})


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "simple_icd_10_cm", None)
    with pytest.raises(ValueError, match=r"umedtrain\[demo\]"):
        icd10cm.build(tmp_path, seed=0)
