"""Figures and pages, drawn from what stages wrote; nothing here computes a result."""
