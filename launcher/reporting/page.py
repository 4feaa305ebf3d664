"""The report of an evaluation: one self-contained page of the scores of a model, beside those of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agff.errors import ConfigError
from launcher.evaluation.scores_file import Results, read_results
from launcher.pages.templates import check_page_place, write_page
from launcher.reporting.cells import Cell, Section, axis_for
from launcher.reporting.gallery import Gallery
from launcher.reporting.sections import sections_of
from launcher.reporting.vectors import PATTERN_NAMES, PATTERN_SIGNS, fine_rows, shares_rows, shorter_tables

OPTION = "--html"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model of the page."""

    label: str
    results: Results

    @property
    def weights(self) -> str:
        """The beginning of their hash."""
        return self.results.weights_sha256[:12]

    @property
    def settings(self) -> str:
        """What changes a score beside the weights."""
        return ", ".join(f"{name} {value}" for name, value in _flat(self.results.settings))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A score at the head of the page."""

    name: str
    cell: Cell
    unit: str

    @property
    def beside(self) -> str:
        """The error, and how far above chance."""
        error = f"± {self.cell.error:.1f}" if self.cell.error is not None else ""
        times = f"{self.cell.score / self.cell.chance:.1f} x chance" if self.cell.chance else ""
        return ", ".join(filter(None, (error, times)))


def check_report(html: Path | None, compared: Sequence[Path], *, out: Path) -> None:
    """Raise ConfigError unless the page can be written, in place of no scores, and the files of scores beside
    it can be read: before anything is encoded. out: where the scores go."""
    if html is None:
        if compared:
            raise ConfigError("--compare puts other scores into the HTML report: name its file, --html OUT")
        return
    files = [_scores_file(path) for path in compared]
    if html.resolve() in [path.resolve() for path in (out, *files)]:
        raise ConfigError(f"{OPTION} {html}: the scores are there; choose another file")
    check_page_place(html, option=OPTION)
    for path in files:
        read_results(path)


def write_report(
    html: Path, *, model: Path, results: Results, gallery: Gallery, compared: Sequence[Path]
) -> None:
    """Write the page of the scores of `model`, with those of other files beside them.

    The first entry of each file is shown, the newest of its model. Equal input gives equal bytes. Raises
    ConfigError.
    """
    others = [_scores_file(path) for path in compared]
    labels = _labels([model, *(path.parent for path in others)])
    models = [
        Column(label=label, results=values)
        for label, values in zip(labels, [results, *map(read_results, others)], strict=True)
    ]
    all_results = [column.results for column in models]
    sections = sections_of(all_results)
    fine = fine_rows(all_results)
    write_page(
        html,
        "reporting/report.html.j2",
        option=OPTION,
        models=models,
        notes=list(dict.fromkeys(note for values in all_results for note in values.notes)),
        tiles=_tiles(sections),
        sections=sections,
        patterns=shares_rows(all_results),
        pattern_names=PATTERN_NAMES,
        pattern_signs=PATTERN_SIGNS,
        fine=fine,
        fine_axis=axis_for(
            (cell for row in fine for pair in row.cells if pair for cell in pair), (10, 25, 50, 100), " %"
        ),
        shorter=shorter_tables(all_results, labels),
        looks=gallery.sets,
        num_left_out=gallery.num_left_out,
    )


def _scores_file(path: Path) -> Path:
    """The file itself, or that of a run or release."""
    return path / "scores.json" if path.is_dir() else path


def _labels(folders: Sequence[Path]) -> list[str]:
    """Their names; whole paths where names are equal, and a number where these are."""
    for labels in ([folder.resolve().name for folder in folders], list(map(str, folders))):
        if len(set(labels)) == len(labels):
            return labels
    return [f"{folder} ({number})" for number, folder in enumerate(folders, start=1)]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that are set."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None:
            yield name, value


def _tiles(sections: Sequence[Section]) -> list[Tile]:
    """Of the first model: of each section its means, those of most sets first, else its first score."""
    tiles = []
    for section in sections:
        means = [row for row in reversed(section.rows) if row.is_mean] or section.rows[:1]
        tiles += [
            Tile(name=f"{section.short}{row.name}", cell=cell, unit=section.unit)
            for row in means
            if (cell := row.cells[0]) is not None
        ]
    return tiles
