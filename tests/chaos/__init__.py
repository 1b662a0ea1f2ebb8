"""Kills real `dvc repro` runs at chosen moments, and compares what they end with to a run that nobody disturbed.

`python -m tests.chaos` (`make chaos`) runs the campaigns of `campaigns.py`.
"""
