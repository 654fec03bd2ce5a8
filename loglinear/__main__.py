"""`python -m loglinear`, the command `loglinear` for programs that start modules, such as torchrun."""

from loglinear.cli import main

main()
