"""Reports: list runs, and set the cost and accuracy of a study's rules beside its BPTT baseline."""
