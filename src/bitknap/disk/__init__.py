"""Files that appear whole or not at all: atomic writes, append-only logs, columns."""
