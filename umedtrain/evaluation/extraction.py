"""The final answer that a completion states, or None: nothing is ever guessed.

An option's letter is looked for in this order. The first form found decides, even when what it says is
not clear; then there is no answer.

    1. "the answer is C", "Answer: C", \\boxed{C}: the last one, since reasoning may name others on its way
    2. "option C is correct", "C is the right answer", "I choose C": all of them must agree
    3. a first or last line that is an option and nothing else: "C", "(C)", "C. its text", "its text"
    4. where the options are yes, no and maybe: a text that opens with one of them

A letter counts in upper case only (in brackets in either) and with a boundary after it, so that "a beta
blocker", "B cells", "C-reactive protein" and "C. difficile" name no option. An option's whole text counts
instead of its letter. Negated, conditional or questioned answers are none. "A and C", a letter beside another
option's text, a letter that no option has and two different answers side by side are no answer at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from umedtrain.evaluation.questions import LETTERS, YES_NO_MAYBE, Question

_UNCLEAR = ""  # an answer was stated, but not just one of the options

_STATEMENT = re.compile(
    r"""(?ix)
    (?<![\w-]) answers? (?:\s+(?:choice|option|letter))?
    (?:\s+(?:here|to\s+(?:this|the)\s+(?:question|problem)))? (?![\w-]) \s*
    (?P<verb> [:=] | -(?=\s) | (?:is|are|(?:would|should|must|will)\s+be) (?!\w) (?:\s*:)? )
    | (?P<boxed> \\boxed\s*\{ )
    """
)
# "This answer is ..." speaks about an answer, "the wrong answer is ..." names another.
_DENIED_BEFORE = re.compile(
    r"""(?ix) (?<!\w) (?: (?:this|that|which|what|wrong|incorrect|false|other|another|no) \s+
        (?:(?:correct|right|best|final)\s+)? | (?:if|whether) \s+ (?:\w+\s+){0,3} ) \Z"""
)
_DENIED_AFTER = re.compile(r"(?i)\s*(?:not|never|neither|unlikely)(?!\w)")
_INSTEAD = re.compile(r"(?i)\s*not\s+(?:option\s+)?\(?[A-Z]\)?\s*,?\s*(?:but(?:\s+rather)?|rather)\s+")
_ABOUT = re.compile(r"(?i)\s*(?:based|consistent|supported|correct|right|clear|obvious|explained|confirmed)(?!\w)")
_SPACE = re.compile(r"""[\s:"'“‘]*""")
_LEAD = re.compile(
    r"""(?ix) (?: [\s:"'“‘]+ | as\s+follows(?!\w) | (?:most\s+)?(?:likely|probably|clearly|definitely|therefore)(?!\w)
        | (?:either|both)(?!\w)
        | (?:the\s+)?(?:correct\s+)?(?:option|choice|letter)(?=\s*[:(\[]|\s+[a-z](?!\w)) )*"""
)
_ARTICLE = re.compile(r"(?i)(?:(?:the|an?)\s+)?")

# What may follow a letter or an option's text. A full stop and a small letter may be "C. difficile".
_BOUNDARY = r"""(?: (?= \s*\Z | \s*\.(?!\w|[ ]+[a-z]) | \s*[,;:)\]}!?"”(\[\n] | ['’](?!\w) | \s+[-–—]\s
    | \s+(?:because|since|as|for|due|given|which|based|in|with)(?!\w) ) )"""
_END = re.compile("(?x)" + _BOUNDARY)
_BRACKETED = re.compile(r"\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\s*\}")
_LETTER = re.compile(rf"(?x) ([A-Z]) (?: {_BOUNDARY} | (?=\s+(?:and|or|nor)(?!\w) | \s*[/&]) )")
_INITIAL = re.compile(r"([A-Z])(?!\w)")
_AFTER_LETTER = re.compile(r"""[\s.):\]\-–—,("']*""")
_ANOTHER = re.compile(
    rf"""(?x) [)\]]? (?: \s*,?\s*(?:and|or|nor|plus|as\s+well\s+as|(?:along|together)\s+with)\s+
          | \s*[,/&]\s* | \s*\((?:and|or)\s+ )
        (?:(?:option|choice|possibly|maybe)\s+)? \(?
        ([A-Z]) (?: {_BOUNDARY} | (?=\s+(?:and|or|nor)(?!\w)) )"""
)
_AND_OR = re.compile(r"(?i)\s*,?\s*(?:(?:and|or|plus|as\s+well\s+as|(?:along|together)\s+with)(?!\w)|[/&])")

_CHOICE = re.compile(
    r"""(?x)
    (?i: (?:correct|best|right)\s+(?:option|choice)\s*(?:is|:)
      | (?<!\w)I\s+(?:would\s+)?(?:choose|select|pick) )
      \s+ (?:(?i:option|choice)\s+)? \(? (?P<named>[A-Z]) \)? (?= \s*(?:[.,;:\n]|\Z) )
    | (?<![\w-]) \(? (?P<subject>[A-Z]) \)? \s+ is \s+ (?:(?:clearly\s+)?the\s+)?
      (?: (?:correct|best|right)(?:\s+(?:answer|option|choice))? | answer ) (?![\w-])
    """
)
_LISTED = re.compile(r"\W*(?:(?i:option|choice)\s+)?([A-Z])\s*[.):]")
_LINE_LETTER = re.compile(r"(?:(?i:so|therefore|thus|hence),?\s+)?(?:(?i:option|choice)\s+)?\(?([A-Z])\)?[.:]?")
_LINE_TEXT = re.compile(r"(?:(?i:option|choice)\s+)?\(?([A-Z])(?:[.):]+|\s+[-–—])\s*(.+)")


def extract(question: Question, text: str, *, truncated: bool = False) -> str | None:
    """The answer that a completion gives: a letter, or the normalised text for an open question."""
    if question.options:
        return extract_letter(text, len(question.options), question.options, truncated=truncated)
    answer = extract_answer(text, truncated=truncated)
    return None if answer is None else normalize_answer(answer) or None


def right_answer(question: Question) -> str:
    """What `extract` returns for a right completion."""
    return question.answer if question.options else normalize_answer(question.answer)


def normalize_answer(text: str) -> str:
    """Lower case, single spaces, no article before and no punctuation around: to compare open answers."""
    text = " ".join(text.split()).casefold().strip(" .,;:!\"'“”‘’*`")
    return text[_ARTICLE.match(text).end() :]


def extract_letter(
    text: str, num_options: int, option_texts: Sequence[str] = (), *, truncated: bool = False
) -> str | None:
    """The letter of the option that a completion chooses, or None when it chooses none or more than one.

    Args:
        num_options: letters beyond these are no answer.
        option_texts: the options' texts, so that "the answer is azithromycin" counts.
        truncated: the completion was cut at its token limit, so a form at its very end may be half a word.
    """
    if not 1 <= num_options <= len(LETTERS) or len(option_texts) not in (0, num_options):
        given = f"{num_options} options with {len(option_texts)} texts"
        raise ValueError(f"{given}: give 1 to {len(LETTERS)} options and the texts of all or none")
    options = _Options(LETTERS[:num_options], tuple(_flat(option) for option in option_texts))
    text = _plain(text)
    if truncated:
        text += "…"  # glued to the last word, it is no boundary: "the answer is B" may have become "B cells"
    for form in (_from_statements, _from_choices, _from_lines, _from_opening):
        letter = form(text, options)
        if letter is not None:
            return letter or None
    return None


def extract_answer(text: str, *, truncated: bool = False) -> str | None:
    """The text X of the last "the answer is X." of a completion, without its full stop, or None.

    X ends with its line or before a further sentence. One that is cut off at the token limit is none.
    """
    text = _plain(text) + ("…" if truncated else "")
    for match in reversed(_statements(text)):
        if _ABOUT.match(text, match.end()):
            continue
        rest = text[match.end() :].partition("}")[0] if match["boxed"] else text[match.end() :].lstrip(" \n\t:")
        sentence = re.split(r"(?<=\w\w\w)[.!]\s+(?=[A-Z…])", rest.partition("\n")[0])[0]
        answer = sentence.strip(" \"'“”‘’*`[]").removesuffix(".").strip()
        return None if not answer or answer.endswith(("…", "?")) else answer
    return None


@dataclass(frozen=True)
class _Options:
    """Reads a letter or an option's text at a place in a text."""

    letters: str
    texts: tuple[str, ...]

    def own_text(self, letter: str) -> str:
        return self.texts[self.letters.index(letter)] if self.texts else ""

    def with_text(self, line: str) -> str | None:
        """The option whose text this is, None for none; _UNCLEAR when several share it."""
        wanted = _flat(line)
        found = [letter for letter, text in zip(self.letters, self.texts, strict=False) if text == wanted]
        return None if not found else (found[0] if len(found) == 1 else _UNCLEAR)

    def starting(self, text: str, start: int) -> tuple[str | None, int]:
        """The option whose text, the longest that fits, begins here, and where it ends."""
        start = _ARTICLE.match(text, start).end()
        found: dict[int, list[str]] = {}
        for letter, option in zip(self.letters, self.texts, strict=False):
            option = option[_ARTICLE.match(option).end() :]
            end = start + len(option)
            if option and _begins(text, start, option) and (_END.match(text, end) or _AND_OR.match(text, end)):
                found.setdefault(len(option), []).append(letter)
        if not found:
            return None, start
        length = max(found)
        return (found[length][0] if len(found[length]) == 1 else _UNCLEAR), start + length

    def read(self, text: str, start: int) -> tuple[str, int]:
        """The option that is named from here on, or _UNCLEAR, and where its naming ends."""
        for place in (_SPACE.match(text, start).end(), _LEAD.match(text, start).end()):
            letter, end = self.starting(text, place)
            if letter is not None:
                beside = re.compile(r"\s*\(([A-Z])\)").match(text, end)
                several = _AND_OR.match(text, end) or (beside and beside[1] != letter)
                return (_UNCLEAR if several else letter), end
        return self._read_letter(text, place)

    def _read_letter(self, text: str, start: int) -> tuple[str, int]:
        initial = _INITIAL.match(text, start)
        if initial and initial[1] in self.letters and self.own_text(initial[1]):
            after = _AFTER_LETTER.match(text, initial.end()).end()
            if _begins(text, after, self.own_text(initial[1])):
                return initial[1], after + len(self.own_text(initial[1]))
        match = _BRACKETED.match(text, start) or _LETTER.match(text, start)
        if match is None:
            return _UNCLEAR, start
        letter, end = match[match.lastindex].upper(), match.end()
        another = _ANOTHER.match(text, end)
        if letter not in self.letters or (another and another[1] != letter):
            return _UNCLEAR, end
        # "B. Azithromycin" and "B (azithromycin)" where azithromycin is option C: a whole sentence, not its
        # beginning.
        beside = re.compile(r"[\s.):\]–—-]*\(?([^()\n]*?)(?:[.!)]\s|[.!)]?\s*\Z|\)|\n)").match(text, end)
        if beside and self.with_text(beside[1]) not in (None, letter):
            return _UNCLEAR, end
        return letter, end


def _from_statements(text: str, options: _Options) -> str | None:
    """The last "the answer is ...", unless the one right before it says something else."""
    found: list[tuple[str, int, int]] = []
    for match in _statements(text):
        instead = _INSTEAD.match(text, match.end())
        start = instead.end() if instead else match.end()
        letter, end = options.read(text, start)
        unread = letter == _UNCLEAR and not text[start:end].strip(" :\n\"'“‘")
        if unread and (_ABOUT.match(text, start) or (match["verb"] == ":" and "\n" in text[end:].strip())):
            continue  # about an answer given before, or a heading over an explanation
        if re.compile(r"[\s)\]}.]*\?").match(text, end):
            continue
        found.append((letter, match.start(), end))
    if not found:
        return None
    if len(found) > 1 and found[-2][0] not in (_UNCLEAR, found[-1][0]):
        between = text[found[-2][2] : found[-1][1]]
        if re.fullmatch(r"(?i)(?:\W|(?<!\w)(?:so|therefore|thus|hence|and|or|but|also|the)(?!\w))*", between):
            return _UNCLEAR
    return found[-1][0]


def _statements(text: str) -> list[re.Match[str]]:
    """Where an answer is stated, without those that are negated, conditional or about another answer."""
    kept = []
    for match in _STATEMENT.finditer(text):
        denied_before = _DENIED_BEFORE.search(text[max(0, match.start() - 60) : match.start()])
        denied_after = _DENIED_AFTER.match(text, match.end()) and not _INSTEAD.match(text, match.end())
        if match["boxed"] or not (denied_before or denied_after):
            kept.append(match)
    return kept


def _from_choices(text: str, options: _Options) -> str | None:
    found = {match["named"] or match["subject"] for match in _CHOICE.finditer(text)}
    if not found:
        return None
    return min(found) if len(found) == 1 and found <= set(options.letters) else _UNCLEAR


def _from_lines(text: str, options: _Options) -> str | None:
    """The one option that a first or last line is; a list of options, maybe cut short, is no answer."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [_line_option(line, options) for line in lines]
    if not lines or (named[0] is None and named[-1] is None):
        return None
    listed = {match[1] for match in map(_LISTED.match, lines) if match and match[1] in options.letters}
    found = listed | {letter for letter in named if letter is not None}
    return min(found) if len(found) == 1 else _UNCLEAR


def _line_option(line: str, options: _Options) -> str | None:
    match = _LINE_LETTER.fullmatch(line)
    if match:
        return match[1] if match[1] in options.letters else _UNCLEAR
    match = _LINE_TEXT.fullmatch(line)
    if match and options.with_text(match[2]) is not None:
        # A text that two options share is made clear by its letter.
        own = match[1] in options.letters and options.own_text(match[1]) == _flat(match[2])
        return match[1] if own else _UNCLEAR
    return options.with_text(line)


def _from_opening(text: str, options: _Options) -> str | None:
    if not options.texts or not set(options.texts) <= set(YES_NO_MAYBE):
        return None
    match = re.match(r"\s*(yes|no|maybe)\s*[.,;:!\n]", text, re.IGNORECASE)
    return options.with_text(match[1]) if match else None


def _begins(text: str, start: int, wanted: str) -> bool:
    return text[start : start + len(wanted)].lower() == wanted


def _plain(text: str) -> str:
    """Without the marks of Markdown and LaTeX, which stand between a letter and its boundary."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\]]|\$", "", text)
    return re.sub(r"\*\*|__|(?<!\w)[*_`]+|[*_`]+(?!\w)", "", text)


def _flat(text: str) -> str:
    return " ".join(_plain(text).split()).lower().strip(" \"'").removesuffix(".")
