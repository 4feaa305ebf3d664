"""Scoring a model on sets, tables of scores, examples to look at."""
