"""Tasks, the loop that serves them all, and what a run keeps."""
