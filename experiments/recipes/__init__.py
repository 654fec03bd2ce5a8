"""The training of the experiments' models: recipes of long texts and of needles, each for one of `comparison.KINDS`."""
