"""The formats of structure files, one family a file.

Each has `read(text, name)`, which cuts a text into entries without understanding them, and `parse(payload)`, which
gives the cell of one. A parser may raise anything on broken input: `readers.parse` makes an `Unusable` of it.
"""
