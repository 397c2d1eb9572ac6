"""Each target, from the plan to the runtime that loads its files."""
