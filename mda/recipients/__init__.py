"""From a name to the account that receives its mail."""
