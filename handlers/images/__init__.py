"""From the bytes of a picture to the values that a network takes."""
