"""Pages out of templates: escaped, whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest

from agff.errors import ConfigError
from launcher.pages import templates
from launcher.pages.templates import check_page_place, write_page


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of templates."""
    monkeypatch.setattr(templates, "_LAUNCHER", tmp_path)
    (tmp_path / "t.html.j2").write_text('<p title="{{ title }}">{{ words }}</p>\n')
    return tmp_path


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a & b", "a &amp; b"),
        ("half \ud800", r"half \ud800"),
        ("٣ ❤️", "٣ ❤️"),
    ],
)
def test_whatever_is_filled_in_stays_text(folder: Path, words: str, shown: str) -> None:
    write_page(folder / "a.html", "t.html.j2", option="--html", title='x" onload="y', words=words)
    content = (folder / "a.html").read_text(encoding="utf-8")
    assert content == f'<p title="x&#34; onload=&#34;y">{shown}</p>\n'
    assert {path.name for path in folder.iterdir()} == {"a.html", "t.html.j2"}


def test_a_name_that_nothing_fills_is_an_error(folder: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
        write_page(folder / "a.html", "t.html.j2", option="--html", words="x")
    assert not (folder / "a.html").exists()


def test_a_place_that_cannot_be_written_is_named_with_its_option(folder: Path) -> None:
    for place, reason in ((folder / "none/a.html", "No such file or directory"), (folder, "a folder is in")):
        with pytest.raises(ConfigError, match=f"--html {place}: cannot write the page: {reason}"):
            check_page_place(place, option="--html")
    with pytest.raises(ConfigError, match=r"--out .*none/a\.html: cannot write the page: No such file"):
        write_page(folder / "none/a.html", "t.html.j2", option="--out", title="", words="")
    check_page_place(folder / "a.html", option="--html")
    assert {path.name for path in folder.iterdir()} == {"t.html.j2"}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_words_have_contrast_on_everything_below_them(mode: str) -> None:
    """At least 4.5 : 1, WCAG 2.2's level AA."""
    style = (templates._LAUNCHER / "pages/base.html.j2").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", light if mode == "light" else dark))
    ratios = {
        (words, below): contrast(colours[words], colours[below])
        for words in ("text", "quiet", "link", "good", "bad")
        for below in ("page", "panel")
    }
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def contrast(first: str, second: str) -> float:
    lighter, darker = sorted(map(luminance, (first, second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
