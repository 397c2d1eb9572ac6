"""Reports: HTML pages, pictures and the facts on them."""
