"""What leaves a transaction again: notices to senders, and one day mail to other hosts."""
