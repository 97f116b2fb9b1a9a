"""Everything that parses message text; only the session process imports it."""
