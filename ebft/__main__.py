"""`python -m ebft` runs the command line."""

from ebft.cli import main

main()
