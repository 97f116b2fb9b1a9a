"""Who is on which terminal, whether they take messages, and the one write."""
