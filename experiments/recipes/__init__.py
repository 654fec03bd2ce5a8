"""The training of the experiments' models: recipes of long texts, of needles and of memorised random tokens."""
