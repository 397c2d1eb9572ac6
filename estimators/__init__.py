"""Signals that fill cost tables: one file each, and the evidence they run from."""
