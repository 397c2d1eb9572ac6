"""Commands that read what other tools wrote, and write what they read."""
