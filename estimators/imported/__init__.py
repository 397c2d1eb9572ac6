"""Costs that other tools have measured, as cost tables: their users solve with our limits."""
