"""The receiver: what happens between the client's socket and the broker."""
