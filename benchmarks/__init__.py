import sys

if sys.argv[0] == "-m":  # Python is looking for a module of this package to run: signals are answered from here on
    from loglinear import signals

    signals.install(signals.end)
