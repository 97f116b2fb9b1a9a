"""What leaves a transaction again: mail for other hosts, notices, and what waits."""
