"""scores.json: what a model scored, set by set. Scores of other weights or settings are kept apart, never
mixed.

{weights_sha256, settings, model, date, num_mmeb_queries, num_mmvp_pairs, notes,
 mmeb: {sets: [{name, score, ..., note, date}], meta_tasks, distributions, overall} or null,
 mmvp: {patterns, average, date} or null,
 captions, choices, regions, caption_quality: [{name, note, date, scores}], see `judged`,
 truncations: [{dim, num_fine, scores: {name: score}}], see `truncated`,
 patterns: [{name, shares of the four patterns, ...}], see `pattern_use`,
 other: [the same of other weights or settings, newest first]}

The means are those of the sets that are there. A set that is scored again replaces its own score only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_type_hints

from agff.embedder import Embedder
from agff.errors import ConfigError, StorageError
from agff.files import locked, partial_path, write_text
from agff.scoring import MmebReport, MmvpReport, PatternScore, SetScore, mmeb_report
from launcher.evaluation.judged import Judged, JudgedScore, JudgedSet, judged_values, read_judged
from launcher.evaluation.pattern_use import Patterns, PatternUse, pattern_values, read_patterns
from launcher.evaluation.truncated import Truncated, merged, read_truncated, truncated_values

Similarity: TypeAlias = Literal["fused", "global"]
"""What the scores of whole items are by: all vectors, or the global ones alone."""

_Score = TypeVar("_Score")
_MOST = {bool: 1, int: 2**63, float: 100.001}
"""Counts; percent, with the rounding of a sum of shares."""
_REASON = "because items are missing, unreadable or refused (--allow_missing)"


@dataclass(frozen=True, kw_only=True)
class ScoredSet:
    """The score of one MMEB set, with what must be said beside it."""

    score: SetScore
    note: str | None
    date: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All scores of one model under one choice of settings."""

    weights_sha256: str
    settings: Mapping[str, Any]
    """JSON values of what changes a score beside the weights: `settings_of`."""
    sets: Mapping[str, ScoredSet]
    mmvp: MmvpReport | None = None
    mmvp_date: str | None = None
    judged: Judged = field(default_factory=dict)
    truncated: Truncated = field(default_factory=dict)
    patterns: Patterns = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all sets."""
        mmvp = ["MMVP"] if self.mmvp is not None else []
        return [*self.sets, *mmvp, *(name for _, name in self.judged)]

    @property
    def mmeb(self) -> MmebReport | None:
        """All sets and their means."""
        return mmeb_report([scored.score for scored in self.sets.values()]) if self.sets else None

    @property
    def notes(self) -> list[str]:
        """Sentences that must appear beside the scores."""
        notes = [scored.note for scored in self.sets.values() if scored.note]
        if self.settings.get("similarity") == "global":
            notes.append("scored by the global vectors alone (--similarity global).")
        if self.sets and (max_queries := self.settings.get("max_queries")) is not None:
            notes.append(f"only the first {max_queries} queries of each MMEB set were read.")
        if left_out := [*filter(None, map(_left_out, self.sets.values()))]:
            notes.append(f"left out, {_REASON}: {'; '.join(left_out)}.")
        if self.mmvp is not None and (pairs := self.mmvp.average.num_pairs_left_out):
            total = pairs + self.mmvp.average.num_pairs
            notes.append(f"left out, {_REASON}: {pairs:,} of {total:,} pairs of MMVP.")
        notes += [entry.note for entry in self.judged.values() if entry.note]
        if left_out := [*filter(None, (entry.left_out for entry in self.judged.values()))]:
            notes.append(f"left out, {_REASON}: {'; '.join(left_out)}.")
        return list(dict.fromkeys(notes))


def settings_of(model: Embedder, *, max_queries: int | None, similarity: Similarity) -> dict[str, Any]:
    """What changes a score beside the weights: the queries asked, the vectors compared, the dtype computed
    in, the processor's limits, the fusion."""
    return {
        "max_queries": max_queries,
        "similarity": similarity,
        "dtype": str(model.dtype).removeprefix("torch."),
        "processor": asdict(model.processor.limits),
        "fusion": asdict(model.fusion),
    }


def check_place(path: Path) -> None:
    """Raise ConfigError unless scores can be written to `path`, beside those that are there."""
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "a folder is in its place")
        try:
            with locked(partial):  # a file system may have no locks, and `_merge` needs one
                pass
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: scores cannot be written there: {error.strerror}; name another file (--out)"
        ) from None
    _read(path)


def read_results(path: Path) -> Results:
    """The newest scores in a file: of the weights and settings that wrote it last. Raises ConfigError."""
    entries = _read(path)
    if not entries:
        raise ConfigError(f"{path}: no such file of scores; launcher/evaluate.py writes it")
    return _results(entries[0])


class ScoresFile:
    """scores.json of a model; several evaluations may write to it at the same time."""

    def __init__(self, path: Path, *, model: str, weights_sha256: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._model = model
        self._new = Results(weights_sha256=weights_sha256, settings=settings, sets={})

    def add_set(self, score: SetScore, *, note: str | None) -> None:
        """Write one set's score; those of other sets stay."""
        scored = ScoredSet(score=score, note=note, date=_now())
        self._merge(lambda results: replace(results, sets={**results.sets, score.name: scored}))

    def add_mmvp(self, report: MmvpReport) -> None:
        """Write MMVP's scores, all patterns together."""
        self._merge(lambda results: replace(results, mmvp=report, mmvp_date=_now()))

    def add_judged(self, kind: str, name: str, scores: Sequence[JudgedScore], *, note: str | None) -> None:
        """Write one set's scores of one of `judged.KINDS`; all others stay."""
        entry = JudgedSet(kind=kind, name=name, scores=tuple(scores), note=note, date=_now())
        self._merge(lambda results: replace(results, judged={**results.judged, (kind, name): entry}))

    def add_truncated(self, scores: Truncated) -> None:
        """Write what a set scores with each truncation; those of other sets stay."""
        if scores:
            self._merge(lambda results: replace(results, truncated=merged(results.truncated, scores)))

    def add_patterns(self, name: str, use: PatternUse | None) -> None:
        """Write what one set's fused similarities are made of; None: of global vectors alone, nothing."""
        if use is not None:
            self._merge(lambda results: replace(results, patterns={**results.patterns, name: use}))

    def results(self) -> tuple[Results, int]:
        """(what is in the file of these weights and settings, how many others are in it)."""
        entries = _read(self.path)
        mine = self._of_these_weights(entries)
        return mine, sum(not self._is_mine(entry) for entry in entries)

    def _merge(self, change: Callable[[Results], Results]) -> None:
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock")):
                entries = _read(self.path)
                values = _values(change(self._of_these_weights(entries)), self._model)
                values["other"] = [entry for entry in entries if not self._is_mine(entry)]
                write_text(self.path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: scores cannot be written: {error.strerror}") from None

    def _is_mine(self, entry: Mapping[str, Any]) -> bool:
        key = (self._new.weights_sha256, self._new.settings)
        return (entry["weights_sha256"], entry["settings"]) == key

    def _of_these_weights(self, entries: Sequence[Mapping[str, Any]]) -> Results:
        return next((_results(entry) for entry in entries if self._is_mine(entry)), self._new)


def _read(path: Path) -> list[dict[str, Any]]:
    """The file's entries, one for each weights and settings; none without a file. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [content, *content.pop("other")]
        for entry in entries:
            _results(entry)
        return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a file of scores as this version writes it ({error!r}); move it away or name "
            "another file (--out)"
        ) from None


def _values(results: Results, model: str) -> dict[str, Any]:
    mmeb = results.mmeb
    mmeb_values = asdict(mmeb) if mmeb is not None else None
    if mmeb_values is not None:
        for values, scored in zip(mmeb_values["sets"], results.sets.values(), strict=True):
            values.update(note=scored.note, date=scored.date)
    mmvp = results.mmvp
    return {
        "model": model,
        "weights_sha256": results.weights_sha256,
        "settings": results.settings,
        "date": _now(),
        "num_mmeb_queries": mmeb.overall.num_queries if mmeb is not None else 0,
        "num_mmvp_pairs": mmvp.average.num_pairs if mmvp is not None else 0,
        "notes": results.notes,
        "mmeb": mmeb_values,
        "mmvp": {**asdict(mmvp), "date": results.mmvp_date} if mmvp is not None else None,
        **judged_values(results.judged),
        "truncations": truncated_values(results.truncated),
        "patterns": pattern_values(results.patterns),
    }


def _results(values: Mapping[str, Any]) -> Results:
    """Raises ValueError, TypeError or KeyError for what `_values` would not write."""
    mmeb, mmvp = values["mmeb"], values["mmvp"]
    sets = mmeb["sets"] if mmeb is not None else []
    report = None
    if mmvp is not None:
        patterns = tuple(_from_values(PatternScore, pattern) for pattern in mmvp["patterns"])
        report = MmvpReport(patterns=patterns, average=_from_values(PatternScore, mmvp["average"]))
    return Results(
        weights_sha256=values["weights_sha256"],
        settings=dict(values["settings"]),
        sets={
            entry["name"]: ScoredSet(
                score=_from_values(SetScore, entry), note=entry["note"], date=entry["date"]
            )
            for entry in sets
        },
        mmvp=report,
        mmvp_date=mmvp["date"] if mmvp is not None else None,
        judged=read_judged(values, _from_values),
        truncated=read_truncated(values, _from_values),
        patterns=read_patterns(values, _from_values),
    )


def _from_values(kind: type[_Score], values: Mapping[str, Any]) -> _Score:
    hints = get_type_hints(kind)
    given = {part.name: values[part.name] for part in fields(cast(Any, kind))}
    if wrong := [name for name, value in given.items() if type(value) is not hints[name]]:
        raise ValueError(f"{wrong[0]} = {given[wrong[0]]!r}")
    numbers = [(name, value) for name, value in given.items() if isinstance(value, int | float)]
    if wrong := [name for name, value in numbers if not 0 <= value <= _MOST[type(value)]]:  # and NaN
        raise ValueError(f"{wrong[0]} = {given[wrong[0]]!r}")
    return kind(**given)


def _left_out(scored: ScoredSet) -> str | None:
    queries, candidates = scored.score.num_queries_left_out, scored.score.num_candidates_left_out
    if not queries and not candidates:
        return None
    total = queries + scored.score.num_queries
    return (
        f"{queries:,} of {total:,} queries of {scored.score.name} and {candidates:,} candidates of its others"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
