"""What commands print for people: tables of rich, and the same as JSON values."""
