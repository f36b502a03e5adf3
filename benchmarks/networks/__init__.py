"""Networks as people have them: archived, served, and compared with torch run by hand."""
