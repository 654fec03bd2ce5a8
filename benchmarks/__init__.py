import sys

if sys.argv[0] == "-m":  # `python -m` is about to run a module of this package: answer signals from now on
    from loglinear import signals

    signals.install(signals.end)
