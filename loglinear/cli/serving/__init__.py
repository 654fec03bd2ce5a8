"""The HTTP service of `loglinear serve`: OpenAI's API, checked and bounded in front of transformers' handlers."""
