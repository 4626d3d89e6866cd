"""``python -m llmlite`` is the console script `llmlite`."""

from llmlite.cli import main

main()
