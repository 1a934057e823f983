"""`python -m megalodon` is the `megalodon` command."""

from megalodon.cli import main

main()
