import pytest

from pipeline import bits
from pipeline.errors import UserError


def test_text_of_bits_and_back():
    assert bits.parse("4484", 4) == (4, 4, 8, 4)
    assert bits.write((4, 4, 8, 4)) == "4484"
    assert bits.parse("16", 3) == (16, 16, 16)
    assert bits.write((16, 16)) == "16"


@pytest.mark.parametrize("text", ["448", "44844", "4474", "", "44 4", "4४84"])
def test_text_that_does_not_fit_is_refused_with_what_fits(text):
    with pytest.raises(UserError, match="needs 4 digits, 4 or 8"):
        bits.parse(text, 4)


def test_grouped_text_is_no_number():
    assert bits.grouped("44844448", 4) == "4484 4448"
    assert bits.grouped("4484", 1) == "4 4 8 4"
    assert bits.grouped("16", 4) == "dense"


@pytest.mark.parametrize(("text", "said"), [("444", "all 4"), ("88", "all 8"), ("4484", "1 of 4 at 8"), ("16", "16")])
def test_summary(text, said):
    assert bits.summary(text) == said
