"""What the command line alone needs."""
