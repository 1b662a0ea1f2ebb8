"""What each technique of a recipe earns: the techniques that are on, runs without each, and what the differences show."""
