"""Choosing by name: an entry, or one line with all names and the nearest."""

import re

import pytest

from loglinear.registry import pick

NUMBERS = {"one": 1, "two": 2, "three": 3}


def test_a_name_gives_its_entry():
    assert [pick("number", NUMBERS, name) for name in NUMBERS] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thre", "unknown number 'thre': did you mean 'three'? There are one, two, three"),
        ("xyz", "unknown number 'xyz': there are one, two, three"),
        (3, "unknown number 3: there are one, two, three"),
    ],
)
def test_another_name_is_refused_and_a_far_one_suggests_nothing(name, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pick("number", NUMBERS, name)
