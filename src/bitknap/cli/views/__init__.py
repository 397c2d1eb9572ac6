"""Output of commands: rich tables, and the same content as JSON values."""
