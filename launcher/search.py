"""`python launcher/search.py INDEX "a red heart"`: the items of a corpus that fit a text or an image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agff.embedder import Embedder, as_item
from agff.errors import AgffError, ConfigError
from agff.files import SILENT_S
from agff.images import FORMATS
from launcher.command_line import report
from launcher.embedding.vectors_folder import Description, VectorsFolder
from launcher.pages.templates import check_page_place
from launcher.searching.build import IndexChoice, build_index
from launcher.searching.faiss_part import FLAT_MOST_ROWS, HNSW_MOST_BYTES, KINDS
from launcher.searching.index_folder import GLOBAL, IndexDescription
from launcher.searching.page import hit_line, shown_hits, write_search_page
from launcher.searching.recall import measure_recall, recall_table
from launcher.searching.searcher import Searcher

ABOUT = f"""\
Build an index of the vectors of launcher/embed.py, and search it.

  python launcher/search.py INDEX --build VECTORS           write the folder INDEX
  python launcher/search.py INDEX "a red heart"             the best items for a text
  python launcher/search.py INDEX --image heart.png         for an image; for both with a text beside it
  python launcher/search.py INDEX --measure_recall          how much the two stages find

FAISS finds k x factor candidates by their global vectors, the fused similarity ranks them. What is near in
a fine vector alone is found where the index has those too (--build VECTORS --fine: M times as large). Up to
{FLAT_MOST_ROWS:,} vectors are compared one by one (flat), up to {HNSW_MOST_BYTES // 2**30} GiB of them are
a graph (hnsw), more are lists (ivf). All of an index is mapped into memory, so it may be larger; --int8
makes it a quarter as large. FAISS trusts the files of an index: open only those of people you trust.
"""
DEFAULT_K, DEFAULT_FACTOR, DEFAULT_QUERIES = 10, 4, 100
BUILD, MEASURE, SEARCH = "--build", "--measure_recall", "a search"
_OPTIONS = {
    BUILD: {"fine", "kind", "int8"},
    MEASURE: {"k", "check", "queries"},
    SEARCH: {"query", "image", "k", "factor", "model", "html", "check"},
}
"""What each use reads; any other that is given is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)  # --image FILE before a text too
    try:
        use = _use(arguments)
        {BUILD: _build, MEASURE: _measure, SEARCH: _search}[use](arguments)
    except AgffError as error:
        return report(error)
    return 0


def _use(arguments: argparse.Namespace) -> str:
    """What is asked for. Raises ConfigError for options that would have no effect."""
    given = {name for name, value in vars(arguments).items() if value != parser().get_default(name)}
    uses = [use for use, name in ((BUILD, "build"), (MEASURE, "measure_recall")) if name in given] or [SEARCH]
    if len(uses) > 1:
        raise ConfigError(f"{' and '.join(uses)}: one at a time")
    if idle := sorted(given - _OPTIONS[uses[0]] - {"index", "build", "measure_recall"}):
        named = ", ".join(name if name == "query" else f"--{name}" for name in idle)
        raise ConfigError(f"{named}: without effect in {uses[0]}; leave it out")
    return uses[0]


def _build(arguments: argparse.Namespace) -> None:
    choice = IndexChoice(
        kind=arguments.kind,
        storage="int8" if arguments.int8 else "float32",
        with_fine=arguments.fine,
    )
    with tqdm(desc="build", unit="vector", unit_scale=True, delay=SILENT_S) as bar:
        description = build_index(arguments.build, arguments.index, choice, progress=bar.update)
    _say(_built(arguments.index, description))


def _built(index: Path, description: IndexDescription) -> str:
    lines = [f"{index}: {description.num_items:,} items"]
    for name, group in description.groups.items():
        size = sum((index / part.file).stat().st_size for part in group.parts)
        num_vectors = description.num_items * group.num_vectors
        lines.append(
            f"  {name:<6}  {group.kind}, {description.storage}, {num_vectors:,} vectors, "
            f"{size / 2**20:,.1f} MiB in {len(group.parts)} file{'s' * (len(group.parts) > 1)}"
        )
    return "\n".join(lines)


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.measure_recall < 1:
        raise ConfigError(f"--measure_recall {arguments.measure_recall} must be >= 1")
    searcher = Searcher(arguments.index, check_hashes=arguments.check)
    num_items, queries = searcher.description.num_items, None
    num_others = num_items if arguments.queries is not None else num_items - 1
    k = arguments.k if arguments.k is not None else max(1, min(DEFAULT_K, num_others))
    searcher.check_request(k, 1)
    if arguments.queries is not None:
        queries = VectorsFolder(arguments.queries, check_hashes=arguments.check)
        _check_same_model(searcher, queries)
    elif k > num_others:
        raise ConfigError(
            f"--k {k}: a query of the corpus is searched among the other {num_others:,} items; give at "
            "most that many, or other queries (--queries)"
        )
    found = measure_recall(searcher, queries, num_queries=arguments.measure_recall, k=k)
    num_queries = min(arguments.measure_recall, num_items if queries is None else len(queries))
    whose = "of the corpus, each among the others" if queries is None else f"of {arguments.queries}"
    _say(
        f"recall@{k} against the exhaustive fused search: {num_queries:,} queries {whose}, "
        f"{num_items:,} items\n{recall_table(found, num_items=num_items)}"
    )


def _check_same_model(searcher: Searcher, queries: VectorsFolder) -> None:
    made_by = searcher.vectors.description.model
    ours, theirs = (_what_decides(folder.description) for folder in (searcher.vectors, queries))
    if changed := [
        name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)
    ]:
        raise ConfigError(
            f"--queries {queries.folder}: made by another model than {searcher.folder}: other "
            f"{', '.join(changed)}; embed the queries with {made_by}"
        )


def _what_decides(description: Description) -> dict[str, Any]:
    """All that two folders share whose vectors may be compared; how many items shared a batch is rounding."""
    settings = {name: value for name, value in description.settings.items() if name != "batch_size"}
    names = ("weights_sha256", "fusion", "num_vectors", "dim")
    return {**settings, **{name: getattr(description, name) for name in names}}


def _search(arguments: argparse.Namespace) -> None:
    query = _query(arguments.query, arguments.image)
    as_item(query)  # before the model is loaded, whose rule for texts is its own
    if arguments.html is not None:
        check_page_place(arguments.html, option="--html")
    searcher = Searcher(arguments.index, check_hashes=arguments.check)
    k = arguments.k if arguments.k is not None else min(DEFAULT_K, searcher.description.num_items)
    factor = arguments.factor if arguments.factor is not None else DEFAULT_FACTOR
    searcher.check_request(k, factor)
    from launcher.embedding.teacher import num_cut  # as in _model_of

    embedder = _model_of(searcher, arguments.model)
    item = as_item(query, embedder.texts)
    query_MD = embedder.encode([item])[0]
    hits = searcher.search(query_MD, k=k, factor=factor)
    lines = [hit_line(place, hit, searcher.vectors.item(hit.row)) for place, hit in enumerate(hits, start=1)]
    _say("\n".join(lines))
    if num_cut(embedder, [item]):
        _say("the query has a text whose end the model does not read: it is too long")
    if arguments.html is not None:
        write_search_page(
            arguments.html,
            text=arguments.query or "",
            image=item.image,
            hits=shown_hits(searcher, hits),
            facts=_facts(arguments, searcher, k, factor),
        )
        _say(f"page: {arguments.html} ({arguments.html.stat().st_size / 1e6:.1f} MB)")


def _query(text: str | None, image: Path | None) -> dict[str, str | Path | None]:
    """The item that is asked for. Raises ConfigError for an empty one, and for a file given as a text: what a
    text means does not depend on which files there are."""
    if text is not None and not text.strip():
        raise ConfigError("the query is empty; give a text, --image FILE, or both")
    if text is None and image is None:
        raise ConfigError("no query; give a text, --image FILE, or both")
    if text is not None and image is None and _is_image_file(text):
        raise ConfigError(
            f"{text!r} would be searched as a text, and a file has this name; for its picture give --image "
            f"{text}, for the text itself search from another folder"
        )
    return {"text": text, "image": image}


def _is_image_file(text: str) -> bool:
    suffixes = {f".{name.lower()}" for name in (*FORMATS, "jpg", "tif")}
    try:
        return Path(text).suffix.lower() in suffixes and Path(text).is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _model_of(searcher: Searcher, named: Path | None) -> Embedder:
    """The release or run that made the index. Raises ConfigError when it is another, or not there."""
    path = Path(searcher.vectors.description.model) if named is None else named
    if not path.is_dir():
        remedy = "name its folder with --model" if named is None else "give the folder of a release or run"
        raise ConfigError(f"{path}: the model of {searcher.folder} is not here; {remedy}")
    from launcher.run.trained_model import load_model  # with DeepSpeed, which building does not need

    is_rounded = searcher.vectors.description.settings.get("weights_dtype") == "bfloat16"
    embedder = load_model(path, dtype=torch.bfloat16 if is_rounded else torch.float32)
    searcher.vectors.check_model(embedder, name=path)
    return embedder


def _facts(arguments: argparse.Namespace, searcher: Searcher, k: int, factor: int) -> list[tuple[str, str]]:
    """What a reader of the page should know."""
    by = "every vector" if searcher.has_fine else "the global vector"
    kind = searcher.description.groups[GLOBAL].kind
    return [
        ("index", f"{arguments.index}, {searcher.description.num_items:,} items, {kind}"),
        ("corpus", searcher.vectors.description.input),
        ("model", searcher.vectors.description.model),
        ("search", f"{k} x {factor} candidates by {by}, ranked by the fused similarity"),
    ]


def _say(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a name may hold what the terminal cannot show
    sys.stdout.write(f"{text}\n".encode(encoding, errors="backslashreplace").decode(encoding))
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="search", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("index", type=Path, help="folder of the index")
    made.add_argument("query", nargs="?", help="a text; never a file")
    made.add_argument(
        "--image", type=Path, metavar="FILE", help="an image to search by, alone or with the text"
    )
    made.add_argument("--k", type=int, help=f"items to find (default: {DEFAULT_K}, or all that there are)")
    made.add_argument(
        "--factor", type=int, help=f"k x factor candidates are re-scored (default: {DEFAULT_FACTOR})"
    )
    made.add_argument(
        "--fine",
        action="store_true",
        help="with --build: the fine vectors too, so that candidates are found by every vector",
    )
    made.add_argument("--model", type=Path, help="the release or run, where it is no longer where it was")
    made.add_argument("--html", type=Path, metavar="OUT", help="also write a page with the pictures")
    made.add_argument(
        "--check", action="store_true", help="compare the hash of every file first, however large"
    )
    made.add_argument("--build", type=Path, metavar="VECTORS", help="write INDEX of this folder of vectors")
    made.add_argument("--kind", choices=KINDS, help="with --build: what to build (default: by size)")
    made.add_argument("--int8", action="store_true", help="with --build: 8 bits a number instead of 32")
    made.add_argument(
        "--measure_recall",
        type=int,
        nargs="?",
        const=DEFAULT_QUERIES,
        metavar="N",
        help=f"compare with the exhaustive fused search, N queries (default: {DEFAULT_QUERIES})",
    )
    made.add_argument(
        "--queries",
        type=Path,
        metavar="VECTORS",
        help="with --measure_recall: queries of this folder of vectors instead of items of the corpus",
    )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
