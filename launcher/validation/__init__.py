"""Scoring a model while it trains: what is scored, by whom, and which checkpoint was best."""
