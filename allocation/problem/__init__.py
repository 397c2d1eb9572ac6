"""What is decided: units, formats, cost tables, budgets and limits, and the problem they make."""
