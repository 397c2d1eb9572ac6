"""Options that commands share, what their values mean, and which can be combined."""
