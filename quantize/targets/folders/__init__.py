"""Folders of weights that other runtimes load."""
