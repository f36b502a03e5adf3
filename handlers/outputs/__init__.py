"""What a caller gets: results, maps, explanations, and the formats they are sent in."""
