"""Where a release comes from: the licence of its backbone, the data and the settings of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.run.origin import backbone_license

FRONT = "---\n{}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": FRONT.format("license: apache-2.0\ntags: [x]")}, "apache-2.0"),
        (
            {"README.md": FRONT.format("license: other\nlicense_name: tongyi-qianwen"), "LICENSE": "Text"},
            "tongyi-qianwen",
        ),
        ({"README.md": FRONT.format("license: other")}, "other"),
        ({"README.md": "# A model", "LICENSE": "\n  Apache License\n2.0"}, "Apache License (LICENSE"),
        ({"LICENCE.txt": "MIT License"}, "MIT License (LICENCE.txt"),
        ({"README.md": FRONT.format("license: [a, b]")}, None),
        ({"README.md": FRONT.format("license: {a: [")}, None),
        ({"README.md": FRONT.format("- a list")}, None),
        ({"README.md": FRONT.format("!!python/object/apply:os.system ['true']"), "LICENSE": "MIT"}, "MIT ("),
        ({"README.md": b"\xff\xfe\x00", "LICENSE": b"\xff\xfe\x00"}, None),
        ({"README.md": FRONT.format('license: "two\\n\\n  lines"')}, "two lines"),
        ({"LICENSE": "x" * 1000}, "x" * 200),
        ({}, None),
    ],
)
def test_licence_is_what_the_folder_says(
    tmp_path: Path, files: dict[str, str | bytes], expected: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = backbone_license(tmp_path)
    assert found == expected or (found or "").startswith(expected or "nothing")


def test_a_folder_that_is_gone_has_no_licence(tmp_path: Path) -> None:
    assert backbone_license(tmp_path / "none") is None
    assert json.dumps(backbone_license(tmp_path / "none")) == "null"
