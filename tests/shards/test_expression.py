"""Expressions of `mmclip filter`: what they match, three values, and all that is refused in one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_shards.document import named_fields
from mmclip_shards.expression import parse_expression

LABELS = ("Edema", "Mass", "Pleural Effusion")


def fields(**changes: object) -> dict[str, object]:
    document: dict[str, object] = {
        "report": {"text": "Mild edema."}, "labels": {"Edema": 1, "Mass": 0, "Pleural Effusion": None}, "patient": "a" * 32,
        "view": "PA", "dataset": "toy", "source": "a/1.png", "width": 512, "height": 600, "age": 61,
    }  # fmt: skip
    return named_fields("k1", {"json": json.dumps(document | changes).encode()})


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ('view == "PA"', True),
        ('view == "PA" and labels["Edema"] == 1', True),
        ('view != "PA" or labels["Mass"] == 0', True),
        ('not view == "PA"', False),
        ('view in ("AP", "PA")', True),
        ('view not in ["AP"]', True),
        ('"edema" in report', True),
        ('"Edema" in report', False),
        ("len(report) > 10", True),
        ("len(report) > 11", False),
        ("500 < width <= 512", True),
        ("512 < width <= 600", False),
        ("width < height", True),
        ("18 <= age < 61", False),
        ("age > 60", True),
        ('labels["Edema"] in (1, -1)', True),
        ('labels["Mass"] == -1', False),
        ("len(boxes) == 0", True),
        ('key == "k1" and dataset == "toy" and "a/" in source', True),
        # what is lacking is neither equal nor unequal
        ('labels["Pleural Effusion"] == 0', False),
        ('labels["Pleural Effusion"] != 1', False),
        ('not labels["Pleural Effusion"] == 1', False),
        ('labels["Pleural Effusion"] == 1 or width == 512', True),
        ('not (labels["Pleural Effusion"] == 1 and width == 0)', True),
        ('labels["Pleural Effusion"] is None and view is not None', True),
    ],
)
def test_what_matches(text: str, matches: bool) -> None:
    assert parse_expression(text, LABELS).matches(fields()) is matches


def test_a_sample_that_lacks_the_field_is_not_matched() -> None:
    for text in ('view == "PA"', 'view != "PA"', 'not view == "PA"', 'view in ["PA"]', 'view not in ["PA"]'):
        assert not parse_expression(text, LABELS).matches(fields(view=None))
    for text in ("len(report) == 0", "len(report) < 5", 'not "edema" in report'):
        assert not parse_expression(text, LABELS).matches(fields(report=None))
    assert parse_expression("report is None", LABELS).matches(fields(report=None))
    assert not parse_expression("width > 1", LABELS).matches(fields(width="wide"))  # another program's set
    assert not parse_expression('labels["Mass"] == 0', LABELS).matches(fields(labels=["Mass"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('vew == "PA"', "there is no field 'vew'; nearest: 'view'"),
        ('lables["Edema"] == 1', "there is no field 'lables'; nearest: 'labels'"),
        ('labels["Oedema"] == 1', "there is no label 'Oedema'; nearest: 'Edema'"),
        ('labels["edema"] == 1', "nearest: 'Edema'"),
        ("view", "`view` is a text, and nothing is asked of it"),
        ('view == "PA" and width', "`width` is a number: compare it"),
        ('view == "PA', "at character"),
        ('view = "PA"', "at character"),
        ("", "invalid syntax"),
        ("width == '512'", "`width` is a number, `'512'` is a text"),
        ("width in (512, '600')", "must list texts, or numbers"),
        ("view in ('PA', width)", "must list texts, or numbers"),
        ("view in (view,)", "no fields"),
        ("view in ()", "must list texts"),
        ('"Edema" in labels', "is a labels"),
        ("view == None", "by `is None`"),
        ("view is 'PA'", "by `is None`"),
        ("len(width) > 1", "it has no len"),
        ("width > True", "`True` is not allowed"),
        ("width + 1 > 2", "is not allowed"),
        ("9 ** 9 ** 9 > width", "is not allowed"),
        ("__import__('os').system('true') == 0", "is not allowed"),
        ("view.upper() == 'PA'", "is not allowed"),
        ("view.__class__ is None", "is not allowed"),
        ("labels[view] == 1", "is not allowed"),
        ("view[0] == 'P'", "is not allowed"),
        ("len(*report) == 1", "is not allowed"),
        ("(lambda: view)() == 'PA'", "is not allowed"),
        ("[x for x in view] is None", "is not allowed"),
        ("f'{view}' == 'PA'", "is not allowed"),
        ("b'PA' == view", "is not allowed"),
        ("(view := 'PA') == 'PA'", "is not allowed"),
        ("not " * 2400 + "view is None", "nested too deeply"),
        ("(" * 4000 + "view" + ")" * 4000, "too many nested|nested too deeply"),
        ("view == 'PA' or " * 1000 + "view == 'AP'", "longer than"),
        ("view == 'P\0'", "null bytes"),
    ],
)  # fmt: skip
def test_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        parse_expression(text, LABELS)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="view lab[]()'\"=<>!andornotis0123.,+-*:\n", max_size=40))
def test_no_text_is_anything_but_an_expression_or_one_line(text: str) -> None:
    try:
        parse_expression(text, LABELS).matches(fields())
    except ValueError as error:
        assert "\n" not in str(error)
