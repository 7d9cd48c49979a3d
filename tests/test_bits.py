import pytest

from pipeline import bits
from pipeline.errors import UserError


def test_text_of_bits_and_back():
    assert bits.parse("4484", 4) == (4, 4, 8, 4)
    assert bits.write((4, 4, 8, 4)) == "4484"
    assert bits.parse("f4f", 3) == (16, 4, 16)
    assert bits.write((16, 8, 4)) == "f84"


def test_text_of_a_vector_and_back():
    assert bits.write_vector(bits.Vector(0.2, (4, 16))) == "0.2:4f"
    assert bits.split("0.2:4f") == (0.2, "4f") and bits.split("0:88") == (0.0, "88")
    assert bits.split("4f8") == (None, "4f8")


@pytest.mark.parametrize("text", ["", "best", "1.2:44", "0.2:", ":44", "0.2:45", "0.2:44:4", "0.:44", "0.2:44\n"])
def test_text_of_no_vector(text):
    assert bits.split(text) is None


@pytest.mark.parametrize("text", ["448", "44844", "4474", "", "44 4", "4४84"])
def test_text_that_does_not_fit_is_refused_with_what_fits(text):
    with pytest.raises(UserError, match="needs 4 letters, 4, 8 or f"):
        bits.parse(text, 4)


def test_grouped_text_is_no_number():
    assert bits.grouped("44844448", 4) == "4484 4448"
    assert bits.grouped("4484", 1) == "4 4 8 4"
    assert bits.grouped("ffff", 2) == "ff ff"


@pytest.mark.parametrize(
    ("text", "said"),
    [("444", "all 4"), ("88", "all 8"), ("4484", "1 of 4 at 8"), ("ff", "all 16"), ("f484", "1 at 8 and 1 at 16 of 4")],
)
def test_summary(text, said):
    assert bits.summary(text) == said
