"""`python -m tokenexit`: the command line."""

from tokenexit.cli import main

main()
