"""From the dicts behind `results.json` to pages and tables for people."""
