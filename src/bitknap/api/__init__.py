"""The public verbs that need torch, one module each."""
