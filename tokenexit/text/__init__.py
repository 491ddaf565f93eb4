"""Text in and out: files, words and their tokens, labels and scores."""
