"""The section of a report that is worth generating, on reports written in the shape that MIMIC-CXR's have."""

import pytest

from pefomed_ray.data.corpora.mimic_sections import preferred_section, sections_of

TITLE = "                                 FINAL REPORT\n"
USUAL = (
    TITLE
    + " EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___-year-old with cough.\n \n COMPARISON:  None.\n \n"
    + " FINDINGS: \n \n The lungs are clear.\n The heart is normal.\n \n IMPRESSION: \n \n No acute process.\n"
)


def report(*sections: str) -> str:
    return TITLE + " \n".join(f" {section}\n" for section in sections)


def test_a_usual_report() -> None:
    assert sections_of(USUAL) == [
        ("preamble", "FINAL REPORT"),
        ("examination", "CHEST (PA AND LAT)"),
        ("indication", "___-year-old with cough."),
        ("comparison", "None."),
        ("findings", "The lungs are clear.\n The heart is normal."),
        ("impression", "No acute process."),
    ]
    assert preferred_section(USUAL) == ("impression", "No acute process.")


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (["FINDINGS: Clear.", "IMPRESSION: "], ("findings", "Clear.")),
        (["IMPRESSION: First.", "FINDINGS: Clear.", "IMPRESSION: Last."], ("impression", "Last.")),
        (["IMPRESSION: First.", "FINDINGS: Clear.", "IMPRESSION: "], ("impression", "First.")),
        (["COMPARISON: ___.", "HISTORY: Cough."], ("comparison", "___.")),
        (["HISTORY: Cough."], ("", "")),
        (["FINDINGS: ", "IMPRESSION: "], ("", "")),
    ],
)
def test_preference(sections: list[str], expected: tuple[str, str]) -> None:
    assert preferred_section(report(*sections)) == expected


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("IMPERSSION", "impression"),
        ("MPRESSION", "impression"),
        ("FINIDNGS", "findings"),
        ("FINDING", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("PORTABLE AP CHEST", "findings"),
        ("COMPARRISON", "comparison"),
        ("COMPARISONS", "comparison"),
        ("REFERENCE EXAM", "comparison"),
        ("CLINICAL HISTORY", "history"),
        ("COMPRESSION", "compression"),
        ("RECOMMENDATION(S)", "recommendation(s)"),
    ],
)
def test_names_are_brought_into_one_form(header: str, name: str) -> None:
    assert (name, "Text.") in sections_of(report(f"{header}: Text."))


def test_a_header_on_the_line_after_an_empty_one_belongs_to_its_text() -> None:
    text = TITLE + " IMPRESSION:\n AP CHEST: Clear.\n"
    assert preferred_section(text) == ("impression", "AP CHEST: Clear.")


def test_only_capitals_at_the_start_of_an_indented_line_are_a_header() -> None:
    text = TITLE + " HISTORY: Fever.\n see IMPRESSION: within.\n Impression: small.\nIMPRESSION: flush.\n"
    assert preferred_section(text) == ("", "")
    assert preferred_section(text + " IMPRESSION: Clear.") == ("impression", "Clear.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TITLE + " \n Chest radiograph.\n \n Lungs are clear.\n \n Heart is normal.\n", True),
        (TITLE + " \n HISTORY:  Fever.\n \n Lungs are clear.\n \n Heart is normal.\n", False),
    ],
)
def test_reports_without_headers_end_in_the_last_paragraph(text: str, expected: bool) -> None:
    rest = "Lungs are clear.\n \n Heart is normal."
    name, section = preferred_section(text)
    assert name == "last_paragraph"
    assert section.endswith(rest)
    assert (section != rest) is expected  # without any header, only the title is set aside


def test_one_paragraph_alone_is_no_section() -> None:
    assert preferred_section("                                 FINAL REPORT\n Lungs are clear.\n") == ("", "")
    assert preferred_section("") == ("", "")


def test_the_final_report_outranks_the_wet_read() -> None:
    wet = " WET READ: ___ ___ ___ 8:46 PM\n  Lines in place.\n \n IMPRESSION: Wet.\n ______\n"
    assert preferred_section("\n" + wet + USUAL) == ("impression", "No acute process.")
    assert preferred_section("\n" + wet)[1].startswith("Wet.")


def test_a_newline_is_all_that_a_header_at_the_end_needs() -> None:
    assert preferred_section(TITLE + " FINDINGS: Clear.\n \n IMPRESSION:\n") == ("findings", "Clear.")
