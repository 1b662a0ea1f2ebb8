"""Ready-made grids that make a phenomenon of training visible; see docs/studies.md."""
