"""Answers found in text and made alike: tables checked by hand, every slip of the official evaluation among them."""

from __future__ import annotations

import random

import pytest

from eas_kit.errors import TaskError
from eas_kit.tasks import answers
from eas_kit.tasks.answers import find_name, find_option, normalise, normalise_reference, plain_words, short_answer

NORMALISED = [
    ("Yes", "yes"),
    ("  a Dog \n", "dog"),
    ("red\tand\nblue", "red and blue"),
    ("", ""),
    # number words and articles, wherever they stand
    ("none", "0"),
    ("Zero", "0"),
    ("ten apples", "10 apples"),
    ("eleven", "eleven"),
    ("The man in the hat", "man in hat"),
    ("vitamin A", "vitamin"),
    ("An", ""),
    # a mark with a blank beside it goes, in all places; one without becomes a blank
    ("black-white", "black white"),
    ("black - white", "black white"),
    ("t-shirt - red", "tshirt red"),
    ("yes, it is", "yes it is"),
    ("yes,it is", "yes it is"),
    ("no!", "no"),
    ("what?! no", "what no"),
    ("(left)", "left"),
    ("a/b", "b"),
    # a comma between digits takes every mark along
    ("1,000", "1000"),
    ("1,000/t-shirt", "1000tshirt"),
    ("1, 000", "1 000"),
    # periods
    ("3.5", "3.5"),
    ("5.", "5"),
    (".5", ".5"),
    ("st. john", "st john"),
    ("u.s.a.", "usa"),
    ("5.a", "5a"),
    ("1.-5", "1 5"),  # the period goes when the mark behind it has become a blank
    ("." * 33, "."),  # only 32 periods are deleted
    # marks that are not in the list stay
    ("10:30", "10:30"),
    ("$5 & 10%", "$5 & 10%"),
    ("'yes'", "'yes'"),
    ("*#|~^", "*#|~^"),
    # apostrophes
    ("dont", "don't"),
    ("DONT", "don't"),
    ("its", "its"),
    ("shes", "shes"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("y'all'dve", "y'all'd've"),
    ("oclock", "o'clock"),
    ("Im", "im"),
    ("somebody'd", "somebodyd"),
    ("somebodyd", "somebodyd"),
    ("somebody'dve", "somebody'd've"),
]


@pytest.mark.parametrize("text, wanted", NORMALISED)
def test_normalise(text, wanted):
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Yes", "Yes"),
        ("the two dogs.", "the two dogs"),
        (" t-shirt ", " t shirt "),
        ("t-shirt -", "tshirt "),
        ("1,000", "1000"),
        ("dont", "dont"),
        ("a\n-b", "a\n b"),  # here a newline is no blank; in a prediction it is one
        ("." * 34 + "5", "..5"),  # the last period stands before a digit; one was too many
    ],
)
def test_normalise_reference(text, wanted):
    assert normalise_reference(text) == wanted


def test_newlines_of_a_prediction_are_blanks_before_marks_are_looked_at():
    assert normalise("x-y\n-z") == "xy z"
    assert normalise("x-y\t-z") == normalise("x-y -z") == "xy z"
    assert normalise("- x-y") == "xy"
    assert normalise("x-y-\n") == "x y"  # the ends are stripped first: no blank beside a mark


def test_apostrophes():
    table = answers._APOSTROPHES
    assert len(table) == 114  # as many official keys are in lower case and change something
    assert all(key == key.lower() and key != form for key, form in table.items())
    turned = {key for key, form in table.items() if len(key) != len(form) - 1}
    assert turned == {"somebody'd"}
    assert not {"hell", "shell", "ill", "were", "well", "shed", "wed", "id", "its", "lets", "shes"} & set(table)
    assert not set(table) & set(table.values())  # so that a second time changes nothing


def test_normalise_twice_changes_nothing_up_to_32_periods():
    rng = random.Random(0)
    atoms = [*" .,-/!?'\"()\n\t159aT", "1,0", "three", "The", "none", *answers._APOSTROPHES]
    for _ in range(3000):
        text = "".join(rng.choice(atoms) + rng.choice(("", " ")) for _ in range(rng.randrange(9)))
        once = normalise(text)
        assert normalise(once) == once, text
    many = "." * 70 + "x"
    assert normalise(many) == "." * 38 + "x" and normalise(normalise(many)) == "." * 6 + "x"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", []),
        ("?!", []),
        ("Left Lung.", ["left", "lung"]),
        ("X-ray, the patient's", ["x", "ray", "the", "patients"]),
        ("the patient’s", ["the", "patients"]),
        ("2.5 cm. T2_weighted", ["2.5", "cm", "t2", "weighted"]),
        ("1,000 of 3, 4", ["1,000", "of", "3", "4"]),
        ("yes yes", ["yes", "yes"]),
    ],
)
def test_plain_words(text, wanted):
    assert plain_words(text) == wanted


STATES = ("Virginia", "Maryland", "West Virginia", "New York")
OPTIONS = [
    # statements
    ("The answer is A.", 0),
    ("The answer is (B).", 1),
    ("the answer is: C", 2),
    ("The answer is c", 2),
    ("Answer: D", 3),
    ("ANSWER: (d)", 3),
    ("The correct answer is option B.", 1),
    ("The answer is **B**.", 1),
    ("The answer is Virginia.", 0),
    ("The answer is west\nvirginia", 2),
    ("The answer is (A) Virginia.", 0),
    ("The answer is A. BECAUSE: Maryland lies north of it.", 0),
    ("The answer is Virginia BECAUSE: it does.", 0),
    ("The answer is Maryland, because the map says so.", 1),
    ("The answer is B because Virginia is too far south.", 1),
    ("Look at the map. The colony is shown. The answer is B.", 1),
    ("The answer is not A. The answer is B.", 1),  # the first is no statement that can be read
    ("The answer is B. So the answer is C.", 1),  # the first that can
    ("Answer: The answer is D.", 3),
    ("A. The answer is D.", 3),  # a statement goes before a letter
    ("Which answer is right? B", None),
    ("The answer isn't A.", None),
    ("The answer is not A.", None),
    ("The answer is B, and this is why.", 1),
    ("The answer is Virginia, and it has a coast.", 0),
    ("The answer is B, and also A.", None),
    ("The answer is A or B.", None),
    ("The answer is (A) or another one.", None),
    ("The answer is A, B.", None),
    ("The answer is (A) or (B).", None),
    ("The answer is Virginia or Maryland.", None),
    ("The answer is Virginia, Maryland.", None),
    ("The answer is (A) Maryland.", None),
    ("The answer is A dog.", None),
    ("The answer is E.", None),
    ("The answer is E. The answer is A.", None),
    ("The answer is Ohio.", None),
    ("The answer is", None),
    ("The answers are A and B.", None),
    # letters
    ("A", 0),
    ("b", 1),
    ("A.", 0),
    ("\n (A) \n", 0),
    ("A) Virginia", 0),
    ("A)Virginia", 0),
    ("(A) Virginia", 0),
    ("A. Virginia", 0),
    ("A Virginia", 0),
    ("B: text", 1),
    ("B - text", 1),
    ("B\nVirginia is further south.", 1),
    ("B. Virginia is further south.", 1),
    ("(C) West Virginia", 2),  # which holds the text of another option
    ("C: It is West Virginia", 2),
    ("Option D", 3),
    ("E", None),
    ("(F)", None),
    ("A dog is an animal", None),
    ("A's", None),
    ("I think so", None),
    ("A-level", None),
    ("A.M.", None),
    ("AB", None),
    ("1", None),
    ("A/B", None),
    ("A, B", None),
    ("A and B", None),
    ("A. B.", None),
    ("(A) and (B)", None),
    ("B: Virginia", None),
    ("B) not Virginia but New York", None),
    ("A\nB", None),
    ("A) Virginia\nB) Maryland\nC) West Virginia\nD) New York", None),
    # texts
    ("Virginia", 0),
    ("VIRGINIA.", 0),
    ("west  virginia", 2),
    ("New York, because it is a port", 3),
    ("New York City", None),
    ("Virginia or Maryland", None),
    ("Virginia\nMaryland", None),
    ("It is Virginia", None),
    ("", None),
    (" \n", None),
    (".", None),
]


@pytest.mark.parametrize("text, wanted", OPTIONS)
def test_find_option(text, wanted):
    assert find_option(text, STATES) == wanted


@pytest.mark.parametrize(
    "text, options, wanted",
    [
        ("The answer is 3.5.", ("3", "3.5"), 1),
        ("The answer is 3.5.", ("3", "4"), None),
        ("The answer is 5, 6.", ("5", "5, 6"), 1),
        ("5%", ("5", "6"), None),
        ("1,000", ("1", "1000"), None),
        ("The answer is X rated? The answer is no.", ("yes", "no"), 1),  # X is no letter that was chosen here
        ("a solid and a liquid", ("a solid", "a solid and a liquid"), 1),
        ("The answer is it is hot.", ("It is hot.", "It is cold."), 0),
        ("x+y (z)", ("x*y", "x+y (z)"), 1),  # no regular expression
        ("E", ("E", "F"), 0),  # beyond the letters, but an option's text
        ("The answer is A.", ("B", "A"), 0),  # a letter goes before a text
        ("yes", ("yes", "yes"), None),
        ("Yes", ("", "yes"), 1),
        ("A dog", ("cat", "A dog"), 1),
        ("A dog is an animal", ("dog", "A dog"), None),
        ("(B) vitamin C", ("vitamin D", "vitamin C", "none"), 1),
        ("A.", ("the only one",), 0),
    ],
)
def test_find_option_among_others(text, options, wanted):
    assert find_option(text, options) == wanted


def test_every_letter_is_found_in_every_format():
    options = [f"item number {i}" for i in range(26)]
    for i in range(26):
        letter = chr(ord("A") + i)
        for form in (
            "{}",
            "{}.",
            "({})",
            "{}) x",
            "The answer is {}.",
            "answer: {}",
            "So the answer is ({}). BECAUSE: x",
        ):
            assert find_option(form.format(letter), options) == i
            if i:
                assert find_option(form.format(letter), options[:i]) is None


def test_find_option_wants_options():
    with pytest.raises(TaskError, match="find_option wants the texts of 1 to 26 options in a list, got 0"):
        find_option("A", [])
    with pytest.raises(TaskError, match="1 to 26 options in a list, got 27"):
        find_option("A", ["x"] * 27)
    with pytest.raises(TaskError, match="in a list, got 'yes'"):
        find_option("A", "yes")


YES_NO = ("yes", "no")
LAND = ("bareland", "residential", "denseresidential", "Forest", "river")


@pytest.mark.parametrize(
    "text, names, wanted",
    [
        ("Yes", YES_NO, "yes"),
        ("no.", YES_NO, "no"),
        ("The answer is yes, because it is.", YES_NO, "yes"),
        ("YES yes", YES_NO, "yes"),
        ("nothing is normal", YES_NO, None),
        ("yes and no", YES_NO, None),
        ("not yes", YES_NO, None),
        ("", YES_NO, None),
        ("?", YES_NO, None),
        ("True", ("True", "False"), "True"),
        ("it is false", ("True", "False"), "False"),
        ("It is not true.", ("True", "False"), None),
        ("It isn't true.", ("True", "False"), None),
        ("Untrue", ("True", "False"), None),
        ("Bare Land.", LAND, "bareland"),
        ("bare-land", LAND, "bareland"),
        ("BareLand", LAND, "bareland"),
        ("bare_land", LAND, "bareland"),
        ("dense residential", LAND, "denseresidential"),
        ("DenseResidential area", LAND, "denseresidential"),
        ("a residential area", LAND, "residential"),
        ("dense, residential; residential", LAND, None),
        ("a forest", LAND, "Forest"),
        ("forests", LAND, None),
        ("forest and river", LAND, None),
        ("not a forest: river", LAND, None),
        ("not forest: river", LAND, "river"),
        ("not sure", ("sure", "not sure"), "not sure"),
        ("the answer is 10", ("1", "10"), "10"),
        ("land use", ("landuse", "use case"), "landuse"),
        ("big land use case", ("landuse", "use case"), None),  # they overlap: neither is the longer one
    ],
)
def test_find_name(text, names, wanted):
    assert find_name(text, names) == wanted


@pytest.mark.parametrize("names", [(), "yes", ("yes", "Yes."), ("yes", "?")])
def test_find_name_wants_names_that_differ(names):
    with pytest.raises(TaskError, match="find_name wants a list of names that differ in their letters and digits, got"):
        find_name("yes", names)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Yes", "Yes"),
        ("\n\n left lung. \nIt is on the left.", "left lung"),
        ("The answer is gold. BECAUSE: the number is 79.", "gold"),
        ("the answer is: 3.5.", "3.5"),
        ("Answer: two dogs", "two dogs"),
        ("The correct answer is two dogs.", "two dogs"),
        ("Answer:\ntwo dogs\nand a cat", "two dogs"),
        ("The answer is yes BECAUSE: no", "yes"),
        ("yes because of it", "yes because of it"),
        ("It is clear. The answer is no.", "It is clear. The answer is no"),  # only what leads is cut off
        ("", None),
        (" \n\t", None),
        ("The answer is", None),
        ("The answer is.", None),
        ("BECAUSE: it is", None),
        ("...", None),
    ],
)
def test_short_answer(text, wanted):
    assert short_answer(text) == wanted
