"""What one process of a run is made of, and one attempt at it: begun, saved, evaluated, told of."""
