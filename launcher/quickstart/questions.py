"""Questions about a drawing whose answer is in the concept's name: time, country, colour, direction ..."""

from __future__ import annotations

import re

from launcher.quickstart.concepts import Concept

_COLORS = "red|orange|yellow|green|light blue|blue|purple|brown|black|white|grey|pink"
_DIRECTIONS = "up-right|up-left|down-right|down-left|up-down|left-right|up|down|left|right"
_ZODIAC = "Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus"

_RULES: tuple[tuple[str, str], ...] = (
    (r"(\w+ o'clock|\w+-thirty)", "What time?"),
    (r"flag (.+)", "Which country?"),
    (
        rf"(?:large |small )?({_COLORS}) (?:heart|circle|square|book|apple|diamond|flag|cat|bird)",
        "What color?",
    ),
    (rf"({_COLORS}) (?:question mark|exclamation mark|square button)", "What color?"),
    (r"(black|white) (?:large|medium|medium-small|small) square", "What color?"),
    (r"(?:black|white) (large|medium|medium-small|small) square", "What size?"),
    (r"(large|small) (?:orange|blue) diamond", "What size?"),
    (rf"({_DIRECTIONS}) arrow", "Which way?"),
    (
        r"(?:backhand index pointing|index pointing|magnifying glass tilted) (up|down|left|right)",
        "Which way?",
    ),
    (r"red triangle pointed (up|down)", "Which way?"),
    (r"thumbs (up|down)", "Which way?"),
    (r"(left|right|up|down)wards (?:hand|pushing hand|button)", "Which way?"),
    (r"(left|right)-facing fist", "Which way?"),
    (r".+ facing (right)", "Which way?"),
    (r"keycap (.+)", "Which key?"),
    (r"([A-Z!]+) (?:button|arrow)(?: \(blood type\))?", "What text?"),
    (r"(1st|2nd|3rd) place medal", "Which place?"),
    (r"((?:waxing|waning) (?:crescent|gibbous)|(?:first|last) quarter|full|new) moon", "Which phase?"),
    (rf"({_ZODIAC})", "Which sign?"),
    (r"speaker (low|medium|high) volume", "How loud?"),
    (r"globe showing (.+)", "Which continent?"),
)
_PERSON = re.compile(r"(man|woman|person|men|women|people) (?!and )(.+?)(?: facing right)?")


def questions_of(concept: Concept) -> list[tuple[str, str]]:
    """(question, answer) pairs for this concept; most concepts have none."""
    found = [
        (question, match.group(1))
        for pattern, question in _RULES
        if (match := re.fullmatch(pattern, concept.text))
    ]
    person = _PERSON.fullmatch(concept.text) if concept.group == "People & Body" else None
    if person is not None:
        found += [("Man or woman?", person.group(1)), ("Doing what?", person.group(2))]
    return found
