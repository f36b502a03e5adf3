"""Explanations: which part of a picture a class's score rests on."""
