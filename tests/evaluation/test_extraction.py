"""Every known trap of reading a final answer, as a table of completions."""

import pytest

from umedtrain.evaluation.extraction import (
    extract,
    extract_answer,
    extract_letter,
    normalize_answer,
    right_answer,
)
from umedtrain.evaluation.questions import Question

DRUGS = ("Aspirin", "Oral contraceptive pills", "Azithromycin", "Thiazide diuretic")

STATEMENTS = [
    ("So, the answer is C.", "C"),
    ("Long story.\n\nSo, the answer is B.", "B"),
    ("so the answer is: C", "C"),
    ("The correct answer is:\n\nSo, the answer is A.", "A"),
    ("The correct answer is:\n\nC. Azithromycin", "C"),
    ("The correct answer is as follows:\nC", "C"),
    ("Answer: D", "D"),
    ("Final Answer: (D)", "D"),
    ("ANSWER: b) nothing", None),
    ("The answer is option C.", "C"),
    ("The answer is choice (C).", "C"),
    ("The answer is (c).", "C"),
    ("The answer is [D]", "D"),
    ("[So, the answer is C.]", "C"),
    ("The answer is most likely C.", "C"),
    ("The answer is therefore C.", "C"),
    ("The answer would be D", "D"),
    ("The best answer choice is D.", "D"),
    ("The answer to this question is B.", "B"),
    ("The answers to A and B are wrong. The answer is C.", "C"),
    ("Answer: It is pneumonia, without doubt.\n\nC. Azithromycin", "C"),
    ('The answer is "B".', "B"),
    ("The answer is C because it covers atypical bacteria.", "C"),
    ("The answer is C, which covers atypical bacteria.", "C"),
    ("The answer is C - Azithromycin", "C"),
    ("It is not aspirin, so the answer is B.", "B"),
    ("For this question the answer is B.", "B"),
    # the last statement counts
    ("The answer is B at first sight. But resistance is common. So, the answer is C.", "C"),
    ("Option B is wrong. Option A is correct only in adults. So, the answer is C.", "C"),
    ("The answer is B. This answer is consistent with guidelines.", "B"),
    ("So, the answer is B. The answer is based on the guideline.", "B"),
    ("So, the answer is C. So, the answer is C.", "C"),
    # several
    ("So, the answer is B. So, the answer is C.", None),
    ("So, the answer is B.\nSo, the answer is C.", None),
    ("So, the answer is A, C, and D.", None),
    ("The answer is A and C.", None),
    ("The answer is A or B.", None),
    ("The answer is either A or B.", None),
    ("The answer is both A and C.", None),
    ("The answer is A/B.", None),
    ("The answer is B & C.", None),
    ("The answer is B (or C).", None),
    ("The answers are A and D.", None),
    ("The answer is (A) and (C).", None),
    ("The answer is option A and option C.", None),
    ("The answer is A as well as C.", None),
    ("The answer is A, along with C.", None),
    ("The answer is aspirin plus azithromycin.", None),
    ("The answer is aspirin as well as azithromycin.", None),
    ("The answer is C and not B.", "C"),
    ("The answer is C and the reason is simple.", "C"),
    # negated, conditional, asked
    ("The answer is not B.", None),
    ("The answer isn't B.", None),
    ("The answer cannot be B.", None),
    ("The answer is not B but C.", "C"),
    ("The answer is C, not B.", "C"),
    ("The answer is C. The answer is not B.", "C"),
    ("The wrong answer is B.", None),
    ("An incorrect answer: B.", None),
    ("If the answer is B, the patient must be an adult.", None),
    ("If the answer is B, he would be an adult. He is not. So, the answer is D.", "D"),
    ("The answer is C? The answer is B.", "B"),
    ("So, the answer is C. Could the answer be B?", "C"),
    ("The answer is C?", None),
    # a letter that is none
    ("The answer is a beta blocker.", None),
    ("The answer is A beta blocker.", None),
    ("The answer is a.", None),
    ("The answer is B cells.", None),
    ("The answer is C-reactive protein.", None),
    ("The answer is vitamin D.", None),
    ("The answer is D-dimer.", None),
    ("The answer is C. difficile.", None),
    ("The answer is I think C.", None),
    ("The answer is Cocaine.", None),
    ("The answer is E.", None),
    ("The answer is B. No. So, the answer is F.", None),
    ("The answer is unclear.", None),
    ("The answer is", None),
    ("", None),
    ("   \n\n", None),
    # marks
    ("The answer is **C**.", "C"),
    ("**Answer: C**", "C"),
    ("**Answer:** C", "C"),
    ("**The answer is C. Azithromycin**", "C"),
    ("The answer is *C*", "C"),
    ("The answer is `C`", "C"),
    (r"Hence \boxed{C}", "C"),
    (r"The answer is $\boxed{C}$.", "C"),
    (r"\[ \boxed{\text{C}} \]", "C"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{Azithromycin}", "C"),
    (r"\boxed{\text{B. Oral contraceptive pills}}", "B"),
    (r"\boxed{A, C}", None),
    (r"\boxed{E}", None),
    (r"The answer is $C$.", "C"),
    # the option's text
    ("The answer is azithromycin.", "C"),
    ("So, the answer is the oral contraceptive pills", "B"),
    ("So, the answer is a thiazide diuretic.", "D"),
    ("The answer is azithromycin or aspirin.", None),
    ("The answer is azithromycin and aspirin.", None),
    ("The answer is azithromycin because of atypical bacteria.", "C"),
    ("The answer is doxycycline.", None),
    ("The answer is thiazide.", None),
    ("So, the answer is C. Azithromycin", "C"),
    ("So, the answer is C: Azithromycin.", "C"),
    ("So, the answer is C (azithromycin).", "C"),
    ("So, the answer is C Azithromycin.", "C"),
    ("So, the answer is azithromycin (C).", "C"),
    ("So, the answer is azithromycin (B).", None),
    ("So, the answer is B. Azithromycin", None),
    ("So, the answer is B (azithromycin).", None),
    ("So, the answer is B. Azithromycin, by contrast, is for pneumonia.", "B"),
]

OTHER_FORMS = [
    ("Option C is correct.", "C"),
    ("C is the correct answer.", "C"),
    ("(C) is the best choice, since it works.", "C"),
    ("The correct option is C.", "C"),
    ("I would choose option C.", "C"),
    ("Option C is not correct.", None),
    ("Option C is incorrect.", None),
    ("Option C is correct. Option D is correct.", None),
    ("Option E is correct.", None),
    ("Aspirin was given, thromboembolism (option A).", None),
    # lines
    ("C", "C"),
    ("C.", "C"),
    ("(C)", "C"),
    ("**C**", "C"),
    (" C. Azithromycin\n", "C"),
    ("C) Azithromycin\n\nExplanation: it covers atypical bacteria.", "C"),
    ("It covers atypical bacteria.\n\nC. Azithromycin", "C"),
    ("It covers atypical bacteria.\n\nTherefore, C.", "C"),
    ("It covers atypical bacteria.\n\nAzithromycin.", "C"),
    ("Azithromycin", "C"),
    ("E", None),
    ("c", None),
    ("A", "A"),
    ("A patient comes in", None),
    ("A. Aspirin\nB. Oral contraceptive pills\nC. Azithromycin", None),
    ("A. Aspirin: no.\nB. Oral contraceptive pills: no.\nC. Azithromycin", None),
    ("Aspirin\nAzithromycin", None),
    ("B\nC", None),
    ("B. Azithromycin", None),
    ("Azithromycin is a macrolide.", None),
    ("The options are A, B, C and D.", None),
    ("I do not know.", None),
]


@pytest.mark.parametrize("text,letter", STATEMENTS + OTHER_FORMS)
def test_traps_on_four_options(text, letter):
    assert extract_letter(text, 4, DRUGS) == letter


@pytest.mark.parametrize("text,letter", [("So, the answer is E.", "E"), ("So, the answer is F.", None), ("E", "E")])
def test_letters_past_d(text, letter):
    assert extract_letter(text, 5, (*DRUGS, "Digoxin")) == letter


@pytest.mark.parametrize(
    "text,letter",
    [
        ("So, the answer is C.", "C"),
        ("So, the answer is no.", "C"),
        ("The answer is Maybe", "B"),
        ("yes", "A"),
        ("**Yes**, since the ratio was high.", "A"),
        ("No. The groups did not differ.", "C"),
        ("No difference was seen.", None),
        ("Yes, at first. So, the answer is B.", "B"),
        ("There is no doubt about it.", None),
    ],
)
def test_options_yes_no_maybe_in_any_order(text, letter):
    assert extract_letter(text, 3, ("yes", "maybe", "no")) == letter


def test_opening_yes_is_only_for_yes_no_maybe():
    assert extract_letter("Aspirin, since it thins the blood.", 4, DRUGS) is None


@pytest.mark.parametrize(
    "text,letter",
    [
        ("The answer is both A and B.", "D"),
        ("The answer is D. Both A and B", "D"),
        ("The answer is B.", "B"),
        ("The answer is iron deficiency.", "B"),
        ("The answer is iron.", "A"),
        ("The answer is iron deficiency anemia.", None),
        ("The answer is 0.5 mg.", "C"),
    ],
)
def test_options_inside_options(text, letter):
    assert extract_letter(text, 4, ("Iron", "Iron deficiency", "0.5 mg", "Both A and B")) == letter


@pytest.mark.parametrize("text,letter", [("iron and zinc.", "B"), ("iron, zinc, copper", "C"), ("iron.", "A")])
def test_the_longest_option_text_that_fits(text, letter):
    assert extract_letter(f"The answer is {text}", 3, ("Iron", "Iron and zinc", "Iron, zinc, copper")) == letter


def test_text_that_two_options_share_needs_its_letter():
    options = ("3rd pouch.", "2nd pouch.", "4th pouch.", "3rd pouch.")
    assert extract_letter("The answer is 3rd pouch.", 4, options) is None
    assert extract_letter("So, the answer is D. 3rd pouch.", 4, options) == "D"
    assert extract_letter("D. 3rd pouch.", 4, options) == "D"


def test_signs_in_options_are_kept():
    assert extract_letter("The answer is > 5 mg.", 2, ("< 5 mg", "> 5 mg")) == "B"


def test_works_without_texts():
    assert extract_letter("So, the answer is B.", 4) == "B"
    assert extract_letter("So, the answer is aspirin.", 4) is None


def test_a_form_cut_off_at_the_token_limit_is_none():
    for text in ("So, the answer is B", "So, the answer is B. The answer is", "The answer is aspirin", "C"):
        assert extract_letter(text, 4, DRUGS, truncated=True) is None
    assert extract_letter("So, the answer is B.", 4, DRUGS, truncated=True) == "B"
    assert extract_letter("So, the answer is B. It is the tr", 4, DRUGS, truncated=True) == "B"


def test_bad_arguments():
    with pytest.raises(ValueError, match="4 options with 3 texts"):
        extract_letter("C", 4, DRUGS[:3])
    with pytest.raises(ValueError, match="27 options"):
        extract_letter("C", 27)


def test_long_texts_take_little_time():
    text = "So the answer to this answer option is (if the answer " * 4000
    assert extract_letter(text, 4, DRUGS) is None


@pytest.mark.parametrize(
    "text,answer",
    [
        ("So, the answer is Neoplasms.", "Neoplasms"),
        (
            "Carcinoma of skin. So, the answer is Diseases of the eye and adnexa.",
            "Diseases of the eye and adnexa",
        ),
        ("The answer is X. So, the answer is Y.", "Y"),
        ("The answer is S. aureus.", "S. aureus"),
        ("The answer is St. Louis encephalitis.", "St. Louis encephalitis"),
        ("The answer is 1.5 mg.", "1.5 mg"),
        ("The answer is Neoplasms. This follows from the title.", "Neoplasms"),
        ("The answer is **Neoplasms**.\nMore follows.", "Neoplasms"),
        ("So, the answer is:\nNeoplasms", "Neoplasms"),
        (r"\boxed{Neoplasms}", "Neoplasms"),
        ("The answer is not Neoplasms.", None),
        ("The answer is .", None),
        ("The answer is", None),
        ("The answer is Neoplasms?", None),
        ("Neoplasms", None),
        ("", None),
    ],
)
def test_open_answers(text, answer):
    assert extract_answer(text) == answer


def test_open_answer_cut_off():
    assert extract_answer("So, the answer is Neo", truncated=True) is None
    assert extract_answer("So, the answer is Neoplasms. And", truncated=True) == "Neoplasms"


def test_extract_by_kind_of_question():
    choice = Question("1", "What?", DRUGS, "C", "", "")
    assert extract(choice, "So, the answer is azithromycin.") == right_answer(choice) == "C"
    open_question = Question("2", "What?", (), "The Eye", "", "")
    assert extract(open_question, "So, the answer is eye.") == right_answer(open_question) == "eye"
    assert extract(open_question, "Eye.") is None
    assert extract(choice, "So, the answer is C", truncated=True) is None


def test_normalize_answer():
    assert normalize_answer(' "The  Nervous\nSystem." ') == "nervous system"
    assert normalize_answer("Anemia") == "anemia"
