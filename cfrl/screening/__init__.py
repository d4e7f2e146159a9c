"""What becomes of drawn crystals: stages of screening, their table, retrieval, reference hulls."""
