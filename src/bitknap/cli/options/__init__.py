"""Options that commands share, what their words mean, and which go together."""
