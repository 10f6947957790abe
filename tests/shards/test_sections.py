"""Reports in plain text: headers of all kinds, addenda, removed words, reports without headers."""

from __future__ import annotations

import pytest
from mmclip_shards.datasets.sections import join_sections, parse_choice, split_report


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("FINDINGS", "findings"),
        ("FINDNGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PORTABLE AP CHEST", "findings"),
        ("IMPRESSION", "impression"),
        ("IMPRESSON", "impression"),
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("INDICATION", "indication"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL HISTORY", "indication"),
        ("COMPARISION", "comparison"),
        ("TECHNIQUE", "technique"),
        ("ADDENDUM", "addendum"),
    ],
)
def test_headers(header: str, name: str) -> None:
    assert split_report(f" {header}: Some words.\n More.\n WET READ: Not this.\n")[name] == "Some words. More."


@pytest.mark.parametrize("header", ["EXAMINATION", "WET READ", "NOTIFICATION", "RECOMMENDATION(S)", "FINAL REPORT"])
def test_other_headers_end_a_section_and_are_dropped(header: str) -> None:
    found = split_report(f" IMPRESSION: Clear.\n {header}: CHEST of ___.\n")
    assert found == {"impression": "Clear."}


def test_capitals_and_a_colon_within_a_line_are_no_header() -> None:
    assert split_report(" FINDINGS: Seen on AP: clear, at 12:30.\n") == {"findings": "Seen on AP: clear, at 12:30."}


def test_an_empty_header_does_not_swallow_the_next() -> None:
    assert split_report(" FINDINGS:\n IMPRESSION: Clear.\n") == {"impression": "Clear."}


def test_a_section_that_comes_twice_is_the_last_one() -> None:
    assert split_report(" IMPRESSION: Wet.\n IMPRESSION: Final.\n")["impression"] == "Final."


def test_an_addendum_stands_above_a_full_line() -> None:
    text = f" ADDENDUM  Right, not left.\n {'_' * 78}\n                 FINAL REPORT\n IMPRESSION: Left.\n"
    assert split_report(text) == {"impression": "Left.", "addendum": "Right, not left."}
    assert join_sections(split_report(text)) == "Left."


def test_a_full_line_below_the_report_ends_it() -> None:
    assert split_report(f" FINDINGS: Clear.\n {'_' * 78}\n \n") == {"findings": "Clear."}


@pytest.mark.parametrize("section", ["COMPARISON: None.", "INDICATION: Cough.", "EXAMINATION: CHEST (PA AND LAT)"])
def test_a_section_without_a_paragraph_of_its_own_is_no_report(section: str) -> None:
    found = split_report(f"                 FINAL REPORT\n TECHNIQUE: Two views.\n \n {section}\n")
    assert "last_paragraph" not in found and not join_sections(found)
    below = split_report(f" TECHNIQUE: Two views.\n \n {section}\n \n Lungs are clear.\n")
    assert join_sections(below) == "Lungs are clear."


def test_removed_words_are_one_mark() -> None:
    assert split_report("FINDINGS: As of _____, XXXX no x-XXXX.\r\n") == {"findings": "As of ___, ___ no x-___."}


def test_without_findings_and_impression_what_follows_the_last_header_is_the_report() -> None:
    text = "                 FINAL REPORT\n HISTORY: Cough.\n \n The heart\n \n is\n  large.\n"
    found = split_report(text)
    assert found["last_paragraph"] == "The heart is large." == join_sections(found)
    assert join_sections(found, ("impression",)) == ""  # what was chosen, or nothing
    assert split_report("Clear lungs.") == {"last_paragraph": "Clear lungs."} and split_report("") == {}
    assert split_report("   WET READ AT 5\n\n Clear.\n\n Normal.") == {"last_paragraph": "Clear. Normal."}


def test_chosen_sections_are_joined_in_their_order() -> None:
    found = {"findings": "F.", "impression": "I.", "comparison": "C."}
    assert join_sections(found) == "F.\nI."
    assert join_sections(found, parse_choice("impression, findings,technique")) == "I.\nF."
    with pytest.raises(ValueError, match="there is no section 'findigs'; the sections are findings, impression, "):
        parse_choice("findigs")
