"""Architectures, normalisation and initialisation: plain nn.Modules."""
