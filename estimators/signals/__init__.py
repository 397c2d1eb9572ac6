"""Signals that only rank units: published sensitivity scores, alone or as features."""
