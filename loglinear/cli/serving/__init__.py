"""The HTTP service of `loglinear serve`: OpenAI's API, with checks and limits in front of transformers' handlers."""
