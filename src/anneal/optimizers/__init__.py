"""Optimizers by torch's names: their arguments, parameter groups, and the few that torch lacks."""
