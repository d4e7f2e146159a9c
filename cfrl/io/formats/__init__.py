"""The formats of structure files, one family a file: how a text is cut into entries, and how one is parsed."""
