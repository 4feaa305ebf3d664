"""What a file really is, for the messages about those that are no usable image."""

from __future__ import annotations

HEAD_BYTES = 512
"""The first bytes of a file, from which it is known."""
_MAGIC = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer (git lfs pull fetches the image)"),
    (0, b"/annex/objects/", "a git-annex pointer (git annex get fetches the image)"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    *((0, b"P%d\n" % kind, "PPM") for kind in range(1, 7)),
    (4, b"ftypavi", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "a video"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"%!PS", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (257, b"ustar", "a tar archive"),
)
"""(offset, bytes there, what the file is). Pillow's names for the formats it opens."""


def file_kind(head: bytes) -> str:
    """What a file is, from its first HEAD_BYTES; to be read behind `is`."""
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    if "<svg" in text:
        return "SVG"
    if not head.strip(b"\0"):
        return "zero bytes" if head else "empty"
    if "".join(text.split()).isprintable() and len(text.encode()) > len(head) - 4:
        return f"text ({text[:40]!r})"
    return f"of no known format (it begins with the bytes {head[:8].hex(' ')})"
