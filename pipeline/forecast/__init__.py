"""The cost of a recipe before training: measured on a batch, swept over T, or planned elsewhere."""
