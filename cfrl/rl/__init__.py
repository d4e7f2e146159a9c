"""Tuning by reinforcement: the objectives, the state, what is drawn and scored, the loop."""
