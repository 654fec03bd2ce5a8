"""`python -m experiments.figures`."""

from experiments.figures import app
from loglinear.cli import execute

execute(app, "python -m experiments.figures")
