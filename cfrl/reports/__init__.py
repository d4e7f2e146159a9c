"""Pages, figures and pictures of a run."""
