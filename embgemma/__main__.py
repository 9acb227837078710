"""`python -m embgemma` is the command `embgemma`."""

from embgemma.cli import main

main()
