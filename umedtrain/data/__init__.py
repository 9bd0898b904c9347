"""Records become examples, examples become the micro-batches of training steps."""
