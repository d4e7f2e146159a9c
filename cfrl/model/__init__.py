"""The generator: the transformer, its distributions, drawing from it, training it, published weights."""
