"""Learning curves in, findings out; imports no torch."""
