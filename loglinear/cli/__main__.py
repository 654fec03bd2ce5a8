"""`python -m loglinear.cli` is `loglinear`."""

from loglinear.cli import main

main()
