"""What several kinds of test need."""
