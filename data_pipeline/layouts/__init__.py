"""One file a layout of a data set on disk: what a download holds, row by row."""
