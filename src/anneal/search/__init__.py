"""Hyper-parameter search: `anneal search`, docs/search.md."""
