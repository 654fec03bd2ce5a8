"""This library inside of other programs, by their own interfaces for plugins."""
