"""What a user does with rnnfast, each file runnable by itself: `python -m examples.sequence_classifier`."""
