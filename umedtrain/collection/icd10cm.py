"""Questions on diseases and their place in ICD-10-CM, made on the spot from the `simple-icd-10-cm` package.

A question names a condition, the answer names its chapter of the classification by one word:

    human  Hordeolum externum right upper eyelid: which chapter of ICD-10-CM?
    gpt    So, the answer is Eye.

The splits are cut by three-character category (H00, E11, ...), so no split holds a category of another:
what is right on an unseen split comes from words and parts of words, not from recall. Titles are category
titles, inclusion terms (ICD-10-CM's synonyms) and the leaf titles that share a content word with their
category's title; other leaf titles need their parents to be understood ("Other specified"). Of titles that
differ in side, episode or the like only, one is kept; a title that stands in two categories is dropped. The
card counts what was dropped.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from umedtrain.files import write_jsonl

LABELS = {
    1: "Infections",
    2: "Neoplasms",
    3: "Blood",
    4: "Endocrine",
    5: "Mental",
    6: "Nervous",
    7: "Eye",
    8: "Ear",
    9: "Circulatory",
    10: "Respiratory",
    11: "Digestive",
    12: "Skin",
    13: "Musculoskeletal",
    14: "Genitourinary",
    15: "Pregnancy",
    16: "Perinatal",
    17: "Congenital",
    18: "Symptoms",
    19: "Injury",
    20: "External",
    21: "Services",
}
"""One word for each chapter. Chapter 22, codes for special purposes, has 9 titles and is left out."""

PHRASINGS = (
    "Which chapter of ICD-10-CM: {title}?",
    "{title}: which chapter of ICD-10-CM?",
    "Classify by chapter: {title}.",
    "Where does {title} belong?",
)

SHARES = {"sft": 0.15, "preference": 0.40, "online": 0.15, "validation": 0.15, "test": 0.15}
"""Share of every chapter's categories that each split takes."""

SIZES = {"sft": 2500, "preference": 6000, "online": 2000, "validation": 2000, "test": 2000}
"""Questions in each split."""

SOURCE = (
    "ICD-10-CM, made and given out freely by US agencies: the National Center for Health Statistics "
    "(CDC/NCHS) and the Centers for Medicare & Medicaid Services (CMS). The April 2026 release if the "
    "package is version 1.5.0, read through the MIT-licensed package simple-icd-10-cm. ICD-10, on which "
    "it is based, is the World Health Organization's. Titles are unaltered; questions and one-word "
    "chapter labels are this project's."
)

MAX_TITLE_CHARACTERS = 80

_EMPTY_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "and the with without due for from other unspecified elsewhere classified specified right left "
        "unilateral bilateral type site sites part parts nos not disease diseases disorder disorders "
        "condition conditions",
    )
)
_CODE = re.compile(r"[A-Z]\d[\dA-Z](\.|$)")  # as against chapters ("2") and blocks ("C00-C14")
# Titles that differ in these words only ask the same question.
_VARIANT_WORDS = re.compile(
    r"\b((right|left|bilateral|unilateral|unspecified)( (eye|ear|side))?|first|second|third|trimester|nos|"
    r"stage|with|without|mild|moderate|severe|not|intractable|other|specified|fetus|\d+)\b|[^a-z ]"
)


@dataclass(frozen=True)
class Title:
    """The name of one condition. `category` is its three-character code, `chapter` the chapter's number."""

    text: str
    code: str
    category: str
    chapter: int


def build(
    directory: str | Path,
    *,
    seed: int,
    shares: Mapping[str, float] = SHARES,
    sizes: Mapping[str, int] = SIZES,
) -> dict[str, Any]:
    """Write `<split>.jsonl` for every split, and `card.json`; returns the card. Same arguments, same bytes.

    Rows have UltraMedical's fields: id, type, conversations, answer, score (null: nobody rated them). Rows of
    the split `online` have neither answer nor the assistant's turn.

    Args:
        directory: made if it does not exist.
        seed: decides which categories, titles and phrasings go where.
        shares: share of every chapter's categories for each split; at most 1 in sum.
        sizes: questions of each split, spread as evenly as can be over chapters and their categories.

    Raises:
        ValueError: for shares or sizes that cannot be met, or when `simple-icd-10-cm` is not installed.
    """
    _check_sizes(shares, sizes)
    titles, dropped = usable_titles()
    of_category: dict[str, list[Title]] = defaultdict(list)
    for title in titles:
        of_category[title.category].append(title)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {
        "source": SOURCE,
        "package": f"simple-icd-10-cm {version('simple-icd-10-cm')}",
        "seed": seed,
        "titles": len(titles),
        "dropped_titles": dropped,
        "chance": round(1 / len(LABELS), 4),
        "splits": {},
    }
    categories_of = split_categories(titles, shares, seed=seed)
    for split, size in sizes.items():
        rng = random.Random(f"{seed} {split}")
        pool = [title for category in categories_of[split] for title in of_category[category]]
        if size > len(pool):
            raise ValueError(
                f"sizes[{split!r}] is {size}, but its share {shares[split]} of the categories holds "
                f"{len(pool)} titles; ask for fewer questions or raise the share"
            )
        chosen = _draw_evenly(pool, size, rng)
        path = directory / f"{split}.jsonl"
        write_jsonl(path, [_row(title, rng.choice(PHRASINGS), with_answer=split != "online") for title in chosen])
        card["splits"][split] = _describe(chosen, path)
    card_text = json.dumps(card, indent=1, ensure_ascii=False)
    (directory / "card.json").write_text(card_text + "\n", encoding="utf-8")
    return card


def usable_titles() -> tuple[list[Title], dict[str, int]]:
    """Titles that can be asked about, in the classification's order, and how many were dropped for what.

    Raises:
        ValueError: when `simple-icd-10-cm` is not installed.
    """
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise ValueError("ICD-10-CM needs the package simple-icd-10-cm: pip install 'umedtrain[demo]'") from None
    dropped: Counter[str] = Counter()
    groups: dict[str, list[Title]] = defaultdict(list)
    chapter, category, category_words = 0, "", frozenset()
    for code in dict.fromkeys(icd.get_all_codes(True)):  # a category that is a block of its own is listed twice
        if icd.is_chapter(code):
            chapter = int(code)
        # A code of seven characters adds an episode of care ("initial encounter") to its parent's title.
        if not _CODE.match(code) or icd.is_extended_subcategory(code) or chapter not in LABELS:
            continue
        name = icd.get_description(code)
        texts = list(icd.get_inclusion_term(code))
        if len(code) == 3:
            category, category_words = code, content_words(name)
            texts.insert(0, name)
        elif all(icd.is_extended_subcategory(child) for child in icd.get_children(code)):
            if content_words(name) & category_words:
                texts.insert(0, name)
            else:
                dropped["needs its category's title"] += 1
        for text in texts:
            if len(text) > MAX_TITLE_CHARACTERS:
                dropped[f"longer than {MAX_TITLE_CHARACTERS} characters"] += 1
            elif re.search(r"[A-Z]\d[\dA-Z]", text) or not content_words(text):
                dropped["names a code, or no condition"] += 1
            else:
                groups[_variant_key(text)].append(Title(text, code, category, chapter))
    titles = []
    for group in groups.values():
        if len({title.category for title in group}) > 1:
            dropped["stands in several categories"] += len(group)
        else:
            titles.append(group[0])
            dropped["differs from another in side or degree only"] += len(group) - 1
    return titles, dict(sorted(dropped.items()))


def split_categories(titles: Sequence[Title], shares: Mapping[str, float], *, seed: int) -> dict[str, list[str]]:
    """Categories of each split: of every chapter the same share, drawn by seed, and no category twice."""
    of_chapter: dict[int, dict[str, None]] = defaultdict(dict)
    for title in titles:
        of_chapter[title.chapter][title.category] = None
    splits: dict[str, list[str]] = {split: [] for split in shares}
    for chapter, members in of_chapter.items():
        categories = list(members)
        random.Random(f"{seed} chapter {chapter}").shuffle(categories)
        start = total = 0.0
        for split, share in shares.items():
            total += share
            first, last = round(start * len(categories)), round(total * len(categories))
            splits[split] += categories[first:last]
            start = total
    return splits


def content_words(text: str) -> frozenset[str]:
    """Lower-case words of three letters or more that say something about a condition."""
    return frozenset(re.findall(r"[a-z]{3,}", text.lower())) - _EMPTY_WORDS


def _variant_key(text: str) -> str:
    return " ".join(_VARIANT_WORDS.sub(" ", text.lower()).split()) or text.lower()


def _draw_evenly(pool: Sequence[Title], size: int, rng: random.Random) -> list[Title]:
    """`size` titles, dealt by turns: one of each chapter a round, from the chapter's categories by turns."""
    decks: dict[int, dict[str, list[Title]]] = defaultdict(lambda: defaultdict(list))
    for title in pool:
        decks[title.chapter][title.category].append(title)
    queues = []
    for categories in decks.values():
        hands = list(categories.values())
        rng.shuffle(hands)
        for hand in hands:
            rng.shuffle(hand)
        longest = max(map(len, hands))
        queues.append([hand[turn] for turn in range(longest) for hand in hands if turn < len(hand)])
    drawn: list[Title] = []
    turn = 0
    while len(drawn) < size:
        drawn += [queue[turn] for queue in queues if turn < len(queue)]
        turn += 1
    del drawn[size:]
    rng.shuffle(drawn)
    return drawn


def _row(title: Title, phrasing: str, *, with_answer: bool) -> dict[str, Any]:
    digest = hashlib.sha256(title.text.encode()).hexdigest()[:8]
    row: dict[str, Any] = {
        "id": f"ICD-10-CM,{title.code}-{digest}",
        "type": "Open-End",
        "conversations": [{"from": "human", "value": phrasing.format(title=title.text)}],
        "answer": None,
        "score": None,
    }
    if with_answer:
        label = LABELS[title.chapter]
        row["conversations"].append({"from": "gpt", "value": f"So, the answer is {label}."})
        row["answer"] = label
    return row


def _describe(titles: Sequence[Title], path: Path) -> dict[str, Any]:
    counts = Counter(LABELS[title.chapter] for title in titles)
    return {
        "file": path.name,
        "questions": len(titles),
        "categories": len({title.category for title in titles}),
        "chapters": {label: counts[label] for label in LABELS.values()},
        "majority_class_share": round(max(counts.values()) / len(titles), 4),
    }


def _check_sizes(shares: Mapping[str, float], sizes: Mapping[str, int]) -> None:
    if set(shares) != set(sizes):
        raise ValueError(f"shares and sizes must name the same splits, got {sorted(shares)} and {sorted(sizes)}")
    for split in shares:
        if not 0 < shares[split] <= 1:
            raise ValueError(f"shares[{split!r}] is {shares[split]}; it must lie in (0, 1]")
        if sizes[split] < 1:
            raise ValueError(f"sizes[{split!r}] is {sizes[split]}; every split needs at least one question")
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"the shares sum to {sum(shares.values()):.3f}; they must not exceed 1")
