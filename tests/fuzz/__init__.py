"""Malformed input, thousands of times: `python -m tests.fuzz --cases 10000 --seed 0`.

A case is a valid input that was damaged, or an absurd one, given to a command of cfrl; all of it follows from the seed
and the case's number. What came of it is judged by what the command says and by oracles that share no code with it.

    __main__.py     the command line, and the table of outcomes
    children.py     cases run in child processes, with limits of time and memory
    cases.py        what a case is; how bytes, texts and numbers are damaged
    seeds.py        the valid inputs
    structures.py, stored.py, settings.py, formulas.py, models.py, flags.py     the areas, each with its oracle
"""
