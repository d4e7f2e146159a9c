"""Crystals: elements, space groups and Wyckoff positions, the batch that all pass on, comparing them."""
