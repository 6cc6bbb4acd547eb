"""`python -m ferkd` is the command line."""

from ferkd.cli import main

main()
