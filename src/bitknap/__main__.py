"""`python -m bitknap` is the command line."""

from bitknap.cli import main

main()
