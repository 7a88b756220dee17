"""Images from folders, the resumable order they come in, and the embedded data set."""
