"""Variations of the recipe as DVC experiments: what is to be trained, checkouts to train it in, runs side by side."""
