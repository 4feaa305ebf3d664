"""Pages out of templates (*.html.j2): all that is filled in is escaped, nothing comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

import jinja2

from agff.errors import ConfigError
from agff.files import partial_path, write_text

_LAUNCHER = Path(__file__).parents[1]


def check_page_place(path: Path, *, option: str) -> None:
    """Raise ConfigError unless a page can be written to `path`: before work that would be lost."""
    partial = partial_path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "a folder is in its place")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise _not_writable(path, option, error) from None


def write_page(path: Path, template: str, /, *, option: str, **values: object) -> None:
    """Write `template`, a file below launcher/, filled with the values. Equal values give equal bytes.

    Raises ConfigError, with the option that named it, for a place that cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_LAUNCHER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    content = environment.get_template(template).render(values)
    # a text may hold half of a surrogate pair, which no UTF-8 file can
    content = content.encode("utf-8", errors="backslashreplace").decode("utf-8")
    try:
        write_text(path, content)
    except OSError as error:
        raise _not_writable(path, option, error) from None


def _not_writable(path: Path, option: str, error: OSError) -> ConfigError:
    return ConfigError(f"{option} {path}: cannot write the page: {error.strerror}; choose another file")
