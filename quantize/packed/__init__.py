"""The packed checkpoint: its byte layouts, its files, and the pipeline that writes them."""
