"""HTML pages that a person opens: one style, templates beside the code, small copies of pictures."""
