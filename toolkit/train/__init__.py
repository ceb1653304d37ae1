"""Training: the loop, the train module, durations and callbacks."""
