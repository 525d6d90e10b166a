"""`spiketrain doctor`: what would fail or slow a training down, found before it begins, and what to do about each."""
