"""The study of what weighting by ID does: its cells, weightings, statistics, figures and page."""
