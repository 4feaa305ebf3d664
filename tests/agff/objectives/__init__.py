"""Mirrors agff/objectives."""
