"""Energies above the convex hull, and what about them deserves distrust."""
