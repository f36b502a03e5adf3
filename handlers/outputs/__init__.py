"""Responses: results, maps, explanations, and the formats they are sent in."""
