"""Corrections of whole cost tables: monotone in bits, floors, several texts."""
