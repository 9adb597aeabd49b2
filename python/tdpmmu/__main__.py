"""`python -m tdpmmu` is the command line."""

from tdpmmu.cli import main

main()
