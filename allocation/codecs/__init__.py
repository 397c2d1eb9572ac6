"""Block formats of other runtimes, as far as their bytes are concerned."""
