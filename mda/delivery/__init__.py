"""Into the mailbox or onto the terminal, for one recipient, as that recipient."""
