"""Train image classifiers by the book: a DVC pipeline whose every technique is one line of params.yaml."""
