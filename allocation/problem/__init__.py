"""The problem: units, formats, cost tables, budgets and limits."""
