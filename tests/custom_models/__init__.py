"""A package of networks that anneal knows nothing of, for tests."""
